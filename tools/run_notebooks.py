#!/usr/bin/env python
"""Executes the notebooks, and writes each with its outputs next to its source.

python tools/run_notebooks.py                 # all of notebooks/*.py, in full
python tools/run_notebooks.py 02_data 05      # notebooks whose names start with these words
python tools/run_notebooks.py --quick         # shortened, as in the tests; writes no .ipynb
"""

import argparse
import base64
import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

FOLDER = ROOT / "notebooks"
QUICK = "FISHERTUNE_NOTEBOOK_QUICK"


def sources(names: Sequence[str] = ()) -> list[Path]:
    """Finds the sources of notebooks.

    Args:
        names: The first letters of the names of notebooks; if empty, all notebooks.

    Returns:
        The sources, in order.

    Raises:
        ValueError: if no notebook starts with a name.
    """
    found = sorted(FOLDER.glob("*.py"))
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            raise ValueError(
                f"no notebook starts with {name!r}; there are {', '.join(p.stem for p in found)}"
            )
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def quick_environment(folder: Path) -> dict[str, str]:
    """Draws a few small street scenes, and shortens the notebooks.

    Args:
        folder: An empty folder for the scenes.

    Returns:
        The environment variables that shorten the notebooks.
    """
    from fishertune_d2.streets.dataset import DOMAINS, write_streets  # a slow import

    counts = {("train", "day"): 4, **{("val", domain): 2 for domain in DOMAINS}}
    write_streets(folder / "streets", progress=False, size=(128, 64), counts=counts, workers=1)
    return {QUICK: "1", "DETECTRON2_DATASETS": str(folder)}


def execute(source: Path, environment: Mapping[str, str]) -> NotebookNode:
    """Executes a notebook with this Python, in the notebook's folder.

    If a cell fails, nbclient raises a CellExecutionError with the traceback.

    Args:
        source: The notebook in the percent format.
        environment: Environment variables to add to those of this process.

    Returns:
        The notebook with its outputs.
    """
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(source.parent)}},
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client.execute(env={**os.environ, QUICK: "", "PYTHONPATH": path, **environment})
    return notebook


def clean(notebook: NotebookNode) -> None:
    """Makes the outputs small, and the same on every machine, in place.

    It removes stderr (progress bars and warnings), makes paths relative, and stores photographs as
    JPEG.

    Args:
        notebook: The executed notebook.
    """
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"  # a random id would differ in every run
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            for part in (output, data):
                for kind in {"text", "text/plain", "text/markdown"} & part.keys():
                    part[kind] = part[kind].replace(f"{FOLDER}/", "")
            jpeg = as_jpeg(data["image/png"]) if "image/png" in data else None
            if jpeg is not None:
                del data["image/png"]
                data["image/jpeg"] = jpeg


def as_jpeg(encoded: str) -> str | None:
    """Converts a PNG to JPEG if this halves its size, as for photographs; otherwise returns None.

    Args:
        encoded: The PNG in base64.

    Returns:
        The JPEG in base64, or None.
    """
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    picture.save(file, "JPEG", quality=85, subsampling=0, optimize=True)
    jpeg = base64.b64encode(file.getvalue()).decode()
    return jpeg if 2 * len(jpeg) < len(encoded) else None


def _cpu_seconds() -> float:
    """Returns the processor time of all finished kernels and their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="first letters of a name; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="shorten them, and write no .ipynb")
    args = parser.parse_args()
    try:
        chosen = sources(args.names)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        environment = quick_environment(Path(folder)) if args.quick else {}
        for source in chosen:
            start, cpu_start = time.monotonic(), _cpu_seconds()
            notebook = execute(source, environment)
            seconds, cpu = time.monotonic() - start, _cpu_seconds() - cpu_start
            print(f"{source.stem}: {seconds:.0f} s, of which {cpu:.0f} s of a core", flush=True)
            if not args.quick:
                clean(notebook)
                jupytext.write(notebook, source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
