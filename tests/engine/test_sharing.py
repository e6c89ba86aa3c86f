"""A warm-up or an estimate of other settings is refused before anything is trained."""

import logging
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fishertune_d2.engine import Trainer
from fishertune_d2.fisher import FisherEstimate

from .conftest import final_state, same_end, train


def _train(cfg) -> Path:
    train(cfg)
    return Path(cfg.OUTPUT_DIR)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """The folder of a finished run, of ``tiny_cfg("run")``."""
    return shutil.copytree(finished_run, tmp_path / "run")


# Keys with which the run would have made another warm-up, and another estimate.
OTHERS = {
    "SEED": 1,
    "INPUT__COLOR_AUG_SSD": False,
    "MODEL__VFM__PIXELS": "authors",
    "MODEL__MASK_FORMER__NO_OBJECT_WEIGHT": 0.7,
    "SOLVER__BASE_LR": 0.5,
    "DATASETS__TRAIN": ("tiny_night",),
}


@pytest.mark.parametrize(
    ("key", "value"), [*OTHERS.items(), ("MODEL__VFM__IMG_SIZE", [96, 96])], ids=str
)
def test_a_warm_up_of_other_settings_is_refused(tiny_cfg, run, key, value):
    warmup = str(run / "model_warmup.pth")
    cfg = tiny_cfg("other", TUNING__WARMUP_CHECKPOINT=warmup, **{key: value})
    name = key.replace("__", ".")
    with pytest.raises(ValueError, match=rf"{warmup} is of a run with other.*{name} was .* and is"):
        Trainer(cfg).resume_or_load(resume=False)


@pytest.mark.parametrize(
    ("key", "value"), [*OTHERS.items(), ("FISHER__PERTURB__STRENGTH", 2.0)], ids=str
)
def test_an_estimate_of_other_settings_is_refused_before_the_warm_up(tiny_cfg, run, key, value):
    file = str(run / "fisher.safetensors")
    cfg = tiny_cfg("other", FISHER__ESTIMATE=file, **{key: value})
    name = key.replace("__", ".")
    with pytest.raises(ValueError, match=rf"FISHER.ESTIMATE {file} is of a run.*{name} was"):
        Trainer(cfg).resume_or_load(resume=False)


@pytest.mark.parametrize(
    ("key", "name", "remedy"),
    [
        ("TUNING__WARMUP_CHECKPOINT", "model_warmup.pth", ".*MODEL.WEIGHTS, with .*WARMUP_ITERS 0"),
        ("FISHER__ESTIMATE", "fisher.safetensors", ""),
    ],
)
def test_what_started_from_other_weights_is_refused(tiny_cfg, run, tmp_path, key, name, remedy):
    torch.manual_seed(5)
    public = tmp_path / "public.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), public)
    cfg = tiny_cfg("other", MODEL__VFM__WEIGHTS=str(public), **{key: str(run / name)})
    message = f"it started from other weights than MODEL.VFM.WEIGHTS{remedy}"
    with pytest.raises(ValueError, match=message):
        Trainer(cfg).resume_or_load(resume=False)


def test_an_estimate_of_a_run_that_started_elsewhere_is_refused(tiny_cfg, run):
    weights, file = str(run / "model_0000005.pth"), str(run / "fisher.safetensors")
    cfg = tiny_cfg("other", MODEL__WEIGHTS=weights, FISHER__ESTIMATE=file)
    with pytest.raises(ValueError, match="it started from other weights than MODEL.VFM.WEIGHTS"):
        Trainer(cfg).resume_or_load(resume=False)


def test_weights_that_are_no_warm_up_do_not_fill_the_model(tiny_cfg, run):
    state = torch.load(run / "model_warmup.pth", weights_only=True)
    del state["run"], state["model"]["sem_seg_head.class_predictor.bias"]
    torch.save(state, run / "part.pth")
    cfg = tiny_cfg("other", TUNING__WARMUP_CHECKPOINT=str(run / "part.pth"))
    with pytest.raises(ValueError, match=r"CHECKPOINT .*part.pth: .* do not fill the model"):
        Trainer(cfg).resume_or_load(resume=False)


def test_weights_without_a_trainers_state_are_no_warm_up(tiny_cfg, run):
    state = torch.load(run / "model_warmup.pth", weights_only=True)
    torch.save({"model": state["model"]}, run / "weights.pth")
    options = {"TUNING__WARMUP_CHECKPOINT": str(run / "weights.pth"), "TUNING__WARMUP_ITERS": 1}
    with pytest.raises(ValueError, match="weights.pth: it holds weights alone"):
        Trainer(tiny_cfg("other", **options)).resume_or_load(resume=False)


@pytest.mark.parametrize("key", ["TUNING.WARMUP_CHECKPOINT", "FISHER.ESTIMATE", "MODEL.WEIGHTS"])
def test_a_file_that_is_not_there_is_missed_at_the_start(tiny_cfg, key):
    cfg = tiny_cfg(**{key.replace(".", "__"): "gone"})
    with pytest.raises(FileNotFoundError, match=f"{key} is gone, and there is no such file"):
        Trainer(cfg).resume_or_load(resume=False)


def test_the_way_that_a_refused_resume_names_trains_for_longer(tiny_cfg, run, caplog):
    longer = tiny_cfg("run", SOLVER__MAX_ITER=9, TUNING__D_MAX=0.04)
    with pytest.raises(ValueError, match="can start from this one's warm-up: ") as refused:
        Trainer(longer).resume_or_load(resume=True)
    assert "SOLVER.MAX_ITER was 7 and is 9" in str(refused.value)
    options = str(refused.value).partition("warm-up: ")[2].split()
    assert options[::2] == ["TUNING.WARMUP_CHECKPOINT", "FISHER.ESTIMATE"]

    cfg = tiny_cfg("longer", DATASETS__TEST=(), SOLVER__MAX_ITER=9, TUNING__D_MAX=0.04)
    cfg.merge_from_list(options)
    with caplog.at_level(logging.WARNING):
        out = _train(cfg)
    words = [r.getMessage() for r in caplog.records if "was made in a run where" in r.getMessage()]
    assert len(words) == 2 and all("SOLVER.MAX_ITER was 7 and is 9" in line for line in words)
    assert [final_state(folder)["iteration"] for folder in (run, out)] == [6, 8]
    first, second = (FisherEstimate.load(folder / "fisher.safetensors") for folder in (run, out))
    assert first.notes == second.notes  # the note still names the run that measured it
    assert all(torch.equal(second[name], first[name]) for name in first)


def test_other_settings_of_the_warm_up_leave_no_shortcut(tiny_cfg, run):
    with pytest.raises(ValueError, match="SEED was 42 and is 1.*another OUTPUT_DIR$"):
        Trainer(tiny_cfg("run", SEED=1)).resume_or_load(resume=True)


def test_a_shared_warm_up_and_estimate_give_the_same_end(tiny_cfg, run):
    files = {
        "TUNING__WARMUP_CHECKPOINT": str(run / "model_warmup.pth"),
        "FISHER__ESTIMATE": str(run / "fisher.safetensors"),
    }
    out = _train(tiny_cfg("shared", DATASETS__TEST=(), **files))
    assert same_end(run, out)


def test_an_estimate_of_another_version_of_its_estimator_is_used_with_a_warning(
    tiny_cfg, run, caplog
):
    file = run / "fisher.safetensors"
    estimate = FisherEstimate.load(file)
    estimate.notes["estimator"] = "variational"  # and no version, as in the first one's files
    estimate.save(file)
    cfg = tiny_cfg("other", FISHER__ESTIMATE=str(file))
    with caplog.at_level(logging.WARNING):
        Trainer(cfg).resume_or_load(resume=False)
    assert "by version 1 of the estimator 'variational', which gives another F" in caplog.text
    caplog.clear()
    estimate.notes["version"] = "2"
    estimate.save(file)
    with caplog.at_level(logging.WARNING):
        Trainer(cfg).resume_or_load(resume=False)
    assert "version" not in caplog.text
