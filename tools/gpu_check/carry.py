#!/usr/bin/env python
"""Makes the folder that tools/gpu_check.sh needs on a GPU machine without network.

    python tools/gpu_check/carry.py                  # needs PyPI and the ViT-S weights
    python tools/gpu_check/carry.py --only camvid    # needs CamVid; a second folder

The machine has CPython 3.12 on Linux (x86-64), torch and the packages of HAS. The tests and the
configs need more packages. The command follows the requirements in the metadata of their wheels,
and downloads these wheels. It fails if a requirement is neither carried nor on the machine.

    outputs/gpu_carry/wheels/             packages, Detectron2 among them
    outputs/gpu_carry/weights.safetensors DINOv2 ViT-S/14 in float16
    outputs/gpu_carry/datasets/streets/   a few of the built-in scenes
    outputs/gpu_carry/reference.json      scores of the demo with these files on this CPU
    outputs/gpu_camvid/CamVid/            the files of CamVid without its test split
"""

import argparse
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FISHERTUNE_SHARED", ROOT.parent / "shared"))
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from install_detectron2 import WHEEL  # noqa: E402

from gpu_check.demo import TOY, commit, demo_command, demo_scores  # noqa: E402

# The packages that the machine probably has. With --has, its own list is read.
HAS = """
    absl-py accelerate cloudpickle execnet filelock fsspec grpcio huggingface-hub hypothesis
    iniconfig jinja2 joblib markdown markupsafe matplotlib ml-dtypes networkx numpy onnx
    opencv-python-headless packaging pandas peft pillow pip pluggy portalocker protobuf psutil
    pygments pytest pytest-xdist pyyaml regex requests safetensors scikit-learn scipy setuptools
    sortedcontainers sympy tabulate tensorboard tensorboard-data-server threadpoolctl
    tokenizers torch torchmetrics torchvision tqdm transformers triton typing-extensions werkzeug
""".split()
# The packages of requirements.txt for notebooks, pages, style and types, which the check skips.
NOT_RUN = {
    *("jupytext", "nbclient", "nbformat", "ipykernel", "ruff", "pdoc"),
    *("mypy", "types-pyyaml", "types-tabulate"),
}
TARGET = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "extra": "",
}
GLIBC = ("2_28", "2_27", "2_24", "2_17")  # in the manylinux tags that a wheel may have
# The limit for one trip, with the checkout.
MOST_BYTES = 64 * 2**20
# The numbers of scenes to train and to test on. They are small, to keep the folder small.
TRAINED, TESTED = 16, 3


def wanted(has: set[str]) -> list[Requirement]:
    """Returns requirements.txt without the packages that the machine has."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needs = [Requirement(line.partition("  #")[0]) for line in lines if line[:1] not in ("", "#")]
    return [
        need
        for need in needs
        if _applies(need) and canonicalize_name(need.name) not in NOT_RUN | has
    ]


def fetch_wheels(folder: Path, has: set[str]) -> dict[str, Requirement]:
    """Downloads packages and their requirements; raises RuntimeError if pip fails.

    Args:
        folder: the folder of the wheels.
        has: canonical names of the packages on the machine.

    Returns:
        The downloaded requirements by canonical name.
    """
    folder.mkdir(parents=True)
    carried: dict[str, Requirement] = {}
    queue = wanted(has)
    while queue:
        need = queue.pop(0)
        name = canonicalize_name(need.name)
        if name in carried:
            continue
        wheel = _fetch(need, folder)
        carried[name] = need
        queue += [each for each in requires(wheel) if canonicalize_name(each.name) not in has]
    # Its metadata requires numpy below 2 and black, which it does not need: install_detectron2.py.
    _pip("download", "--python-version", "3.10", "--abi", "none", "--platform", "any",
         "--only-binary=:all:", "-d", str(folder), WHEEL)  # fmt: skip
    for wheel in folder.glob("sal_detectron2-*.whl"):
        drop_compiled(wheel)
    return carried


def drop_compiled(wheel: Path) -> None:
    """Removes the part compiled for CPython 3.10 from Detectron2's wheel, most of its size."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.infolist():
            if not each.filename.endswith(".so"):
                new.writestr(each, old.read(each))
    smaller.replace(wheel)


def requires(wheel: Path) -> list[Requirement]:
    """Returns a wheel's requirements on the machine, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(archive.read(name))
    needs = [Requirement(text) for text in about.get_all("Requires-Dist") or []]
    return [need for need in needs if _applies(need)]


def missing(folder: Path, has: set[str]) -> list[str]:
    """Finds the requirements of the wheels in a folder that are missing or have another version.

    Args:
        folder: the folder with the wheels.
        has: canonical names of the packages on the machine.

    Returns:
        The requirements, each with the wheel that needs it.
    """
    wheels = {canonicalize_name(w.name.split("-")[0]): w for w in sorted(folder.glob("*.whl"))}
    found = []
    for name, wheel in wheels.items():
        if name == canonicalize_name(Requirement(WHEEL).name):
            continue
        for need in requires(wheel):
            other = wheels.get(canonicalize_name(need.name))
            if other is None and canonicalize_name(need.name) not in has:
                found.append(f"{wheel.name} requires {need}, which is not carried")
            elif other is not None and not need.specifier.contains(other.name.split("-")[1]):
                found.append(f"{wheel.name} requires {need}, but {other.name} is carried")
    return found


def _fetch(need: Requirement, folder: Path) -> Path:
    """Downloads a wheel for the machine; if there is none, builds a wheel of pure Python."""
    before = set(folder.iterdir())
    text = f"{need.name}{need.specifier}"
    options = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for glibc in GLIBC:
        options += ["--platform", f"manylinux_{glibc}_x86_64"]
    try:
        _pip("download", *options, "--platform", "manylinux2014_x86_64", "-d", str(folder), text)
    except RuntimeError:
        with tempfile.TemporaryDirectory() as built:
            _pip("wheel", "--wheel-dir", built, text)
            (wheel,) = Path(built).iterdir()
            if not wheel.name.endswith("-none-any.whl"):
                raise RuntimeError(f"{wheel.name} is compiled for this machine: find a wheel for "
                                   f"{text}, or leave it out") from None  # fmt: skip
            shutil.copy(wheel, folder)
    (wheel,) = set(folder.iterdir()) - before
    return wheel


def _pip(command: str, *options: str) -> None:
    words = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *options]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {command} {options[-1]}: {done.stderr.strip().splitlines()[-1]}")


def _applies(need: Requirement) -> bool:
    return need.marker is None or need.marker.evaluate(TARGET)


def carry_weights(source: Path, target: Path) -> None:
    """Writes weights in float16, half the size of float32.

    Args:
        source: a file of DINOv2 ViT-S/14 that MODEL.VFM.WEIGHTS accepts.
        target: the safetensors file to write.
    """
    from safetensors.torch import save_file

    from fishertune_d2.modeling.weight_files import read_checkpoint

    state = {name: value.half().contiguous() for name, value in read_checkpoint(source).items()}
    save_file(state, str(target))


def toy_weights(target: Path) -> None:
    """Writes random weights for the dry run's model."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), str(target))


def carry_scenes(root: Path, toy: bool) -> None:
    """Draws a few of the built-in scenes.

    Args:
        root: the folder of the data set.
        toy: draw small scenes, for a dry run.
    """
    from fishertune_d2.streets import DOMAINS, write_streets

    trained, tested, size = (4, 1, (192, 96)) if toy else (TRAINED, TESTED, (512, 256))
    counts = {("train", "day"): trained, **{("val", domain): tested for domain in DOMAINS}}
    write_streets(root, size=size, counts=counts)


def write_reference(carried: Path, toy: bool) -> None:
    """Trains and tests the demo on this machine's CPU with the carried files.

    Args:
        carried: the folder with the files; the function adds reference.json.
        toy: train the model of a dry run.
    """
    options = [str(word) for pair in TOY.items() for word in pair] if toy else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        environment = {**os.environ, "DETECTRON2_DATASETS": str(carried / "datasets")}
        command = demo_command("cpu", carried / "weights.safetensors", output)
        words = [sys.executable, *command, *options]
        subprocess.run(words, cwd=ROOT, env=environment, check=True)
        text = json.dumps({"commit": commit(), **demo_scores(output)}, indent=1)
    (carried / "reference.json").write_text(text + "\n")


def carry_camvid(source: Path, target: Path) -> None:
    """Copies CamVid's images and labels, without the test split.

    Args:
        source: the folder CamVid.
        target: the copy.
    """
    for part in ("train", "trainannot", "val", "valannot"):
        shutil.copytree(source / part, target / part)


def size_of(folder: Path) -> int:
    """Counts the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checkout_size() -> int:
    """Counts the bytes of the files that git tracks."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    paths = [ROOT / name for name in names.decode().split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def carry_wheels(folder: Path, has: Path | None) -> bool:
    """Makes the folder of wheels again, and names missing packages.

    Args:
        folder: the folder of the wheels.
        has: a file with the output of pip freeze on the machine; None for HAS.

    Returns:
        Whether the folder is complete.
    """
    names = HAS
    if has:
        lines = has.read_text().splitlines()
        names = [re.split(r"[ =<>@]", line)[0] for line in lines if line[:1] not in ("", "#", "-")]
    there = {canonicalize_name(name) for name in names}
    shutil.rmtree(folder, ignore_errors=True)
    carried = fetch_wheels(folder, there)
    print(f"Wheels: {', '.join(sorted(carried))} and Detectron2")
    problems = missing(folder, there)
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return not problems


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [part for part in PARTS if part != "camvid"]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=usual, metavar="PART")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs")
    parser.add_argument("--has", type=Path, help="a file with the output of pip freeze there")
    weights, camvid = "weights/dinov2_vits14_fp16.safetensors", "datasets/CamVid"
    parser.add_argument(
        "--weights", type=Path, default=SHARED / weights, help="a file of DINOv2 ViT-S/14"
    )
    parser.add_argument(
        "--camvid", type=Path, default=SHARED / camvid, help="the folder of CamVid's splits"
    )
    parser.add_argument("--toy", action="store_true", help="make small files for a dry run")
    args = parser.parse_args()
    for part in ("weights", "camvid"):
        if part in args.only and not args.toy and not getattr(args, part).exists():
            parser.error(f"there is no {getattr(args, part)}: name it with --{part}")
    carried, camvid = args.output.resolve() / "gpu_carry", args.output.resolve() / "gpu_camvid"
    carried.mkdir(parents=True, exist_ok=True)
    if "wheels" in args.only and not carry_wheels(carried / "wheels", args.has):
        return 1
    if "weights" in args.only:
        target = carried / "weights.safetensors"
        toy_weights(target) if args.toy else carry_weights(args.weights, target)
    if "scenes" in args.only:
        shutil.rmtree(carried / "datasets", ignore_errors=True)
        carry_scenes(carried / "datasets/streets", args.toy)
    if "reference" in args.only:
        write_reference(carried, args.toy)
    if "camvid" in args.only:
        shutil.rmtree(camvid, ignore_errors=True)
        carry_camvid(args.camvid, camvid / "CamVid")
    return report(carried, camvid)


def report(carried: Path, camvid: Path) -> int:
    """Prints the files to carry; returns 1 if the files of a trip are too large, else 0."""
    rest, status = checkout_size(), 0
    for folder in (carried, camvid):
        if not folder.is_dir():
            continue
        for each in sorted(folder.iterdir()):
            print(f"{size_of(each) if each.is_dir() else each.stat().st_size:>12,} bytes  {each}")
        size = size_of(folder) + rest
        fits = size <= MOST_BYTES
        status |= not fits
        print(f"{size:>12,} bytes  {folder} and the checkout ({rest:,}); at most {MOST_BYTES:,}"
              f"{'' if fits else ': TOO MUCH'}")  # fmt: skip
    return int(status)


PARTS = ("wheels", "weights", "scenes", "reference", "camvid")

if __name__ == "__main__":
    sys.exit(main())
