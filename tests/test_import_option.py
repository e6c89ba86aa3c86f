"""Every command knows the method, the VFM and the data set of a user's own file (``--import``)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.command_line import import_arguments, import_files

from .forked import run_forked

# The parameters of the first block alone, on a renamed VFM and two images.
OWN = """
from dataclasses import replace
from pathlib import Path

from fishertune_d2.data import register_sem_seg
from fishertune_d2.modeling import VFMS
from fishertune_d2.tuning import TUNING_REGISTRY, TuningMethod

VFMS["own_vfm"] = replace(VFMS["tiny"], licence="Own-1.0")
folder = Path(__file__).parent
register_sem_seg("own_data", folder / "images", folder / "labels", ["ground", "wall", "sky"])


class FirstBlock(TuningMethod):
    options = ()

    def parameters(self, backbone):
        names = dict(backbone.named_parameters())
        return {n: p for n, p in names.items() if n.startswith("vit.blocks.0.")}


@TUNING_REGISTRY.register()
def own_method(cfg):
    return FirstBlock()
"""


@pytest.fixture
def own(tmp_path) -> Path:
    """The user's file, beside two images and their labels."""
    rng = np.random.default_rng(0)
    for part, shape, most in (("images", (48, 64, 3), 256), ("labels", (48, 64), 3)):
        (tmp_path / part).mkdir()
        for i in range(2):
            pixels = rng.integers(0, most, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{i}.png")
    (tmp_path / "own_file.py").write_text(OWN)
    return tmp_path / "own_file.py"


def _run(program: str, folder: Path, *arguments: str) -> str:
    run = run_forked(program, arguments, folder, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


def test_each_command_imports_the_file(own, tiny_run):
    folder, imports = own.parent, ("--import", "own_file.py")
    names = ("MODEL.VFM.NAME", "own_vfm", "TUNING.METHOD", "own_method")
    data = ("DATASETS.TRAIN", '("own_data",)', "DATASETS.TEST", '("own_data",)')
    options = [*tiny_run, *names, *data, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
    config = ("--config-file", "fishertune_dinov2.yaml")

    assert "own_method" in _run("fishertune_d2.plan", folder, *config, *imports, *options)
    # Spawned processes have imported nothing before.
    several = ("--num-gpus", "2", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", "out")
    first, second, *keys = several
    _run("fishertune_d2.train", folder, *config, *imports, first, second, *options, *keys)
    state = torch.load(folder / "out/model_final.pth", weights_only=True)
    assert state["run"]["config"]["TUNING.METHOD"] == "own_method"

    of_run = ("--config-file", "out/config.yaml")
    picture = ("--input", "images/0.png", "--output", "seen.png")
    _run("fishertune_d2.predict", folder, *of_run, *imports, *picture)
    assert (folder / "seen.png").is_file()
    _run("fishertune_d2.export", folder, "plain", "out", *imports)
    assert "Own-1.0" in (folder / "out/timm/config.json").read_text()

    table = ("table4", "--profile", "camvid", "--methods", "own_method", "--vfm", "own_vfm")
    given = ("--set", "SOLVER.BACKBONE_MULTIPLIER", "1.0")
    said = _run("fishertune_d2.bench", folder, *table, *given, *imports, "--dry-run")
    assert f"fishertune_d2.train --import {own} --config-file" in said
    assert "TUNING.METHOD own_method MODEL.VFM.NAME own_vfm" in said


def test_a_file_is_executed_once(tmp_path, monkeypatch):
    count, file = tmp_path / "count.txt", tmp_path / "counts_itself.py"
    file.write_text(f"with open({str(count)!r}, 'a') as log:\n    log.write('x')\n")
    monkeypatch.chdir(tmp_path)
    try:
        import_files(["counts_itself.py", str(file)])
        import_files([str(file)])
    finally:
        sys.modules.pop("counts_itself")
    assert count.read_text() == "x"


def test_a_file_that_fails_is_not_taken_for_imported(tmp_path):
    file = tmp_path / "fails_twice.py"
    file.write_text("raise RuntimeError('from the file')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="from the file"):
            import_files([str(file)])


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("none.py", FileNotFoundError, "--import .*none.py: there is no such file"),
        ("own.txt", ValueError, "name a Python file, with the ending .py"),
        ("torch.py", ValueError, "another module torch: rename the file"),
        ("queue.py", ValueError, "another module queue: rename the file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, name, error, words):
    if name != "none.py":
        (tmp_path / name).touch()
    with pytest.raises(error, match=words):
        import_files([str(tmp_path / name)])


def test_other_processes_get_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert import_arguments(["a.py", "b.py"]) == [
        *("--import", str(tmp_path / "a.py")),
        *("--import", str(tmp_path / "b.py")),
    ]
