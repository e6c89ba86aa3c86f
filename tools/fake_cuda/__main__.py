"""Runs a module or a script on the fake CUDA device.

python tools/fake_cuda -m MODULE ARGS...
python tools/fake_cuda SCRIPT ARGS...
"""

import os
import runpy
import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
# Python put this folder first in sys.path, but its modules belong to the package.
sys.path = [folder for folder in sys.path if os.path.abspath(folder or ".") != HERE]
sys.path.append(str(Path(HERE).parent))


def main(words: list[str]) -> None:
    """Runs ``python WORDS`` in this process.

    Raises:
        SystemExit: if the words name nothing, or if the module or script raises it.
    """
    if not words or words == ["-m"] or words[0] in ("-h", "--help"):
        raise SystemExit(__doc__.strip())
    from fake_cuda.runtime import ensure_loaded

    ensure_loaded()
    from fake_cuda.tensor import FakeCuda

    with FakeCuda():
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
