"""Compiles the replacement of CUDA's runtime, and restarts Python with it."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("runtime.c")
# Programs look for the driver under this name.
LIBRARY = "libcuda.so.1"
# Holds the former LD_PRELOAD, in a process that was started with the library.
BEFORE = "FAKE_CUDA_LD_PRELOAD_BEFORE"


def build() -> Path:
    """Compiles the library, unless a temporary folder holds it already.

    Returns:
        The file of the library.

    Raises:
        SystemExit: if there is no gcc, or if gcc fails.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fake_cuda_{os.getuid()}_{digest}"
    library = folder / LIBRARY
    if library.is_file():
        return library
    gcc = shutil.which("gcc")
    if gcc is None:
        raise SystemExit(f"The fake CUDA device needs gcc to compile {SOURCE}: install gcc")
    folder.mkdir(mode=0o700, exist_ok=True)
    # Under another name first, because several processes may compile at the same time.
    unfinished = folder / f"{os.getpid()}.so"
    flags = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{LIBRARY}", "-pthread"]
    made = subprocess.run(
        [gcc, *flags, "-o", str(unfinished), str(SOURCE)], capture_output=True, text=True
    )
    if made.returncode:
        raise SystemExit(f"gcc could not compile {SOURCE}:\n{made.stderr}")
    unfinished.rename(library)
    return library


def ensure_loaded() -> None:
    """Restarts this command with the library, unless the library is loaded already.

    Processes that this one starts do not load it, because they have no :class:`FakeCuda`.
    """
    if BEFORE in os.environ:
        before = os.environ.pop(BEFORE)
        os.environ.pop("LD_PRELOAD")
        if before:
            os.environ["LD_PRELOAD"] = before
        return
    before = os.environ.get("LD_PRELOAD", "")
    preload = f"{build()}:{before}".rstrip(":")
    environment = {**os.environ, "LD_PRELOAD": preload, BEFORE: before}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
