"""Installs Detectron2 into the running Python, unless it is installed. Needs no compiler.

Detectron2 is not on PyPI under its own name (facebookresearch/detectron2#4859). The wheel
sal-detectron2 is Detectron2 of August 2024. It is tagged for CPython 3.10 because of a compiled
part that this project does not use. Its Python files also run on newer versions. Its metadata
requires numpy < 2 and black, but it needs neither, so it is installed without dependencies.
"""

import importlib.util
import subprocess
import sys
import sysconfig
import tempfile

WHEEL = "sal-detectron2==0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


def main() -> int:
    """Returns the exit status."""
    found = importlib.util.find_spec("detectron2")
    if found is not None:
        print(f"Detectron2 is already installed in {found.origin}")
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirement:
        requirement.write(f"{WHEEL} --hash=sha256:{SHA256}\n")
        requirement.flush()
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet"]
        tags = ["--python-version", "3.10", "--implementation", "cp", "--abi", "none"]
        target = ["--target", sysconfig.get_path("purelib"), "-r", requirement.name]
        return subprocess.call([sys.executable, "-m", "pip", "install", *options, *tags, *target])


if __name__ == "__main__":
    sys.exit(main())
