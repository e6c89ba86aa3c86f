"""Every command ends in one sentence, without a traceback, if the user can fix the cause."""

import shlex
from pathlib import Path

import pytest

from .forked import run_forked

CONFIG = ("fishertune_d2.train", "fishertune_d2.plan", "train_net.py")
ON_CPU = "MODEL.DEVICE cpu MODEL.VFM.NAME tiny MODEL.VFM.WEIGHTS random OUTPUT_DIR out"
PREDICT = "--config-file mine.yaml --input seen.png --output out"
METHODS = "'fishertun': did you mean fishertune? There are adaptformer, "
KEY = "SOLVER.BASE_LRR is no key; nearest: SOLVER.BASE_LR"

# Program, arguments, and words of the sentence. mine.yaml is good; gone.* do not exist.
CASES = [
    *(
        case
        for name in CONFIG
        for case in (
            (name, "--config-file gone.yaml", "'gone.yaml' does not exist"),
            (name, "--config-file slip.yaml", f"slip.yaml: {KEY}"),
            (name, "--config-file mine.yaml SOLVER.BASE_LRR 0.1", KEY),
            (name, "--config-file mine.yaml SOLVER.BASE_LR", "no value stands after SOLVER.BASE_L"),
            (name, f"--config-file mine.yaml {ON_CPU} TUNING.METHOD fishertun", METHODS),
            (name, f"--config-file mine.yaml {ON_CPU} MODEL.VFM.NAME dino", "MODEL.VFM.NAME is"),
        )
    ),
    (
        "fishertune_d2.train",
        f"--config-file mine.yaml {ON_CPU} DATASETS.TRAIN \"['gtav_train']\"",
        "set DETECTRON2_DATASETS",
    ),
    ("fishertune_d2.train", f"--config-file mine.yaml --eval-only {ON_CPU}", "MODEL.WEIGHTS"),
    *(
        case
        for name in ("fishertune_d2.predict", "demo.py")
        for case in (
            (name, "--config-file mine.yaml --input gone.png --output out", "--input gone.png: "),
            (name, f"{PREDICT} --opts MODEL.WEIGHTS gone.pth", "MODEL.WEIGHTS is gone.pth"),
            (name, PREDICT, "mine.yaml names no weights"),
            (name, PREDICT.replace("mine", "gone"), "'gone.yaml' does not exist"),
            (name, f"{PREDICT} --opts SOLVER.BASE_LRR 0.1", KEY),
            (
                name,
                f"{PREDICT} --opts MODEL.WEIGHTS model.pth TUNING.METHOD fishertun MODEL.DEVICE "
                "cpu MODEL.VFM.NAME tiny",
                METHODS,
            ),
        )
    ),
    ("fishertune_d2.export", "delta gone.pth", "there is no"),
    ("fishertune_d2.export", "delta model.pth", "--config-file"),
    ("fishertune_d2.export", "delta model.pth --config-file gone.yaml", "gone.yaml"),
    ("fishertune_d2.export", "delta model.pth --config-file slip.yaml", KEY),
    ("fishertune_d2.report", "gone", "there is no gone/config.yaml"),
    ("fishertune_d2.bench", "table1 --set SOLVER.BASE_LRR 0.1", KEY),
    ("fishertune_d2.bench", "table1 --methods fishertun", "fishertun"),
    ("fishertune_d2.bench", "table1 --methods full", "data are missing"),
    ("fishertune_d2.data.check", "cityscapes", "cityscapes_val"),
    ("fishertune_d2.data.check", "--all", "no data set below"),
    ("fishertune_d2.streets", "--output .", "holds no built-in streets"),
    ("fishertune_d2.doctor", "gone", "unrecognized arguments: gone"),
    ("fishertune_d2.analysis.compare", "gone", "gone/results.json"),
    ("fishertune_d2.analysis.methods", "gone", "gone"),
    ("fishertune_d2.analysis.convergence", "gone.json", "gone.json"),
    ("fishertune_d2.analysis.shift_curve", "slip.yaml", "FISHERTUNE_TRACEBACK=1 shows"),
    ("fishertune_d2.analysis.forms", "gone", "there is no fisher.safetensors in gone"),
    ("fishertune_d2.analysis.sensitivity_map", "gone", "there is no fisher.safetensors in gone"),
    ("fishertune_d2.analysis.selection_map", "gone", "there is no selection.safetensors in gone"),
    ("tools/config_costs.py", "gone.yaml", "'gone.yaml' does not exist"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "mine.yaml").write_text("SEED: 1\n")
    (folder / "slip.yaml").write_text("SOLVER: {BASE_LRR: 0.1}\n")
    for name in ("seen.png", "model.pth"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(("program", "arguments", "words"), CASES)
def test_a_command_ends_in_a_sentence(program, arguments, words, folder):
    data = str(folder / "no_data")
    run = run_forked(program, shlex.split(arguments), folder, DETECTRON2_DATASETS=data)
    assert run.returncode not in (0, None), run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    last = run.stderr[run.stderr.rfind("error: ") :]
    assert last.startswith("error: ") and words in last, run.stderr
