"""Each notebook runs when shortened, equals its pair, has clean outputs and copies no code."""

import ast
import base64
import io
import multiprocessing
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import run_notebooks  # noqa: E402

MAX_BYTES = 1_000_000
MAX_LINES = 20  # of a function or class in a cell: enough for a small model of the reader's own
# Matches paths that are two folders deep, and no ends of URLs, tags or relative paths.
ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/<])/(?:[\w.-]+/)+[\w.-]+")


@pytest.fixture(params=run_notebooks.sources(), ids=lambda path: path.stem)
def source(request) -> Path:
    return request.param


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("notebooks")
    variables = run_notebooks.quick_environment(folder)
    return {**variables, "FISHERTUNE_CACHE": str(folder / "cache")}


def _read_outputs(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def _texts(notebook: nbformat.NotebookNode) -> str:
    parts = []
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        parts.append(output.get("text", ""))
        parts += [text for kind, text in output.get("data", {}).items() if "image" not in kind]
    return "\n".join(parts)


def _long_definitions(notebook: nbformat.NotebookNode) -> list[str]:
    found = []
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        code = "\n".join(
            "" if line.startswith(("%", "!")) else line for line in cell.source.split("\n")
        )
        for node in ast.walk(ast.parse(code)):
            named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if named and node.end_lineno - node.lineno >= MAX_LINES:
                found.append(node.name)
    return found


def test_runs_shortened(source, environment, tmp_path):
    # A copy of the folder keeps these files apart from those of the whole notebooks.
    for folder in ("configs", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "notebooks").mkdir()
    for file in run_notebooks.FOLDER.iterdir():
        (tmp_path / "notebooks" / file.name).symlink_to(file)
    # Files of an interrupted execution must not stop the next one.
    for name in ("quickstart", "freeze", "full", "fishertune"):
        folder = tmp_path / "outputs/notebooks/quick" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}\n")
    # A kernel would import everything again for each notebook, which takes longer than the cells.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fishertune_d2.engine"])
    child = context.Process(
        target=_run_cells,
        args=(tmp_path / "notebooks" / source.name, environment, tmp_path / "said.txt"),
    )
    child.start()
    child.join()
    assert child.exitcode == 0, (tmp_path / "said.txt").read_text()[-4000:]


class _Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        """Allows ``%matplotlib inline``, which opens no window."""


def _run_cells(source: Path, environment: dict[str, str], log: Path) -> None:
    """Runs the code cells as a kernel does; exits with 1 at the first that fails."""
    os.chdir(source.parent)
    os.environ |= environment
    torch.set_num_threads(1)
    shell = _Shell.instance()
    with open(log, "w", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
        for cell in jupytext.read(source).cells:
            if cell.cell_type == "code" and not shell.run_cell(cell.source).success:
                sys.exit(1)


def test_a_notebook_is_executed_in_a_kernel(tmp_path):
    (tmp_path / "short.py").write_text("# %% [markdown]\n# Text\n# %%\n%matplotlib inline\n1 + 1\n")
    notebook = run_notebooks.execute(tmp_path / "short.py", {})
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1]
    assert notebook.cells[1].outputs[0].data["text/plain"] == "2"


def test_is_paired_with_its_outputs(source):
    written, kept = jupytext.read(source), _read_outputs(source)
    cells = [[(c.cell_type, c.source) for c in notebook.cells] for notebook in (written, kept)]
    assert cells[0] == cells[1], f"run `python tools/run_notebooks.py {source.stem}`"


def test_kept_outputs_are_whole_and_name_no_machine(source):
    kept = _read_outputs(source)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds and "error" not in kinds
    assert not ABSOLUTE_PATH.findall(_texts(kept))
    assert source.with_suffix(".ipynb").stat().st_size < MAX_BYTES


def test_a_cell_that_shows_a_figure_keeps_it(source):
    for cell in (c for c in _read_outputs(source).cells if c.cell_type == "code"):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if "plt.show()" in cell.source:
            assert kinds & {"image/png", "image/jpeg"}, cell.source


def test_copies_no_code(source):
    assert not _long_definitions(jupytext.read(source))


def test_ends_with_something_to_try(source):
    headings = [
        line for cell in jupytext.read(source).cells if cell.cell_type == "markdown"
        for line in cell.source.split("\n") if line.startswith("## ")
    ]  # fmt: skip
    assert headings[-1] == "## Something to try"


def test_the_guards_find_what_they_look_for():
    long = "def copied():\n" + "    pass\n" * MAX_LINES
    assert _long_definitions(new_notebook(cells=[new_code_cell(long)])) == ["copied"]
    short = "%matplotlib inline\ndef short():\n" + "    pass\n" * (MAX_LINES - 1)
    assert not _long_definitions(new_notebook(cells=[new_code_cell(short)]))
    assert ABSOLUTE_PATH.findall("see /home/me/file.py, line 3") == ["/home/me/file.py"]
    assert not ABSOLUTE_PATH.findall("../outputs/a/b.png https://a.org/b/c/d <b>x</b> 1/2 a / b")


def test_names_choose_by_their_beginning(tmp_path, monkeypatch):
    for name in ("01_a.py", "02_b.py", "02_c.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(run_notebooks, "FOLDER", tmp_path)
    assert [path.name for path in run_notebooks.sources()] == ["01_a.py", "02_b.py", "02_c.py"]
    assert [path.name for path in run_notebooks.sources(["02_b"])] == ["02_b.py"]
    with pytest.raises(ValueError, match="'03'; there are 01_a, 02_b, 02_c"):
        run_notebooks.sources(["03"])


def test_a_failing_cell_is_an_error_with_its_traceback(tmp_path):
    (tmp_path / "bad.py").write_text("# %%\nraise RuntimeError('this cell')\n")
    with pytest.raises(CellExecutionError, match="this cell"):
        run_notebooks.execute(tmp_path / "bad.py", {})


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_cleaning_drops_stderr_and_makes_photographs_small():
    rng = np.random.default_rng(0)
    light = np.linspace(40, 200, 128)[:, None, None]
    photograph = (light + rng.normal(0, 4, (128, 128, 3))).clip(0, 255).astype(np.uint8)
    chart = np.full((128, 128, 3), 255, np.uint8)
    chart[64] = 0
    outputs = [
        new_output("stream", name="stderr", text="/home/me/x.py: UserWarning"),
        new_output("stream", name="stdout", text=f"kept: {run_notebooks.FOLDER}/../outputs/a.png"),
        new_output("display_data", data={"image/png": _png(photograph)}),
        new_output("display_data", data={"image/png": _png(chart)}),
    ]
    notebook = new_notebook(cells=[new_code_cell("1", outputs=outputs)])
    run_notebooks.clean(notebook)
    text, first, second = notebook.cells[0].outputs
    assert text.text == "kept: ../outputs/a.png"
    assert second.data == {"image/png": _png(chart)}
    assert list(first.data) == ["image/jpeg"]
    assert 2 * len(first.data["image/jpeg"]) < len(_png(photograph))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.data["image/jpeg"]))))
    assert pixels.shape == photograph.shape
    assert np.abs(pixels.astype(int) - photograph).mean() < 4
