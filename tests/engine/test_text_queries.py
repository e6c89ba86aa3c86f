"""tqdm's head through the trainer: trains, resumes, evaluates and is built again."""

import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from safetensors.torch import save_file
from torch.multiprocessing import spawn

from fishertune_d2.config import changed, read_config
from fishertune_d2.engine import Trainer, image_losses
from fishertune_d2.engine.parameter_counts import build_empty
from fishertune_d2.engine.perturbation import build_shift
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.export.__main__ import main as export
from fishertune_d2.export.tuned_models import delta_of_run, read_tuned
from fishertune_d2.fisher import estimate_fisher, find_candidates
from fishertune_d2.modeling.frozen import frozen_parameters
from fishertune_d2.modeling.text_tower import TextTower
from fishertune_d2.modeling.vfm import BLOCKS, CLIP, VFMBackbone
from fishertune_d2.plan.costs import make_plan
from fishertune_d2.run import Run

from .conftest import CLASSES, _register, final_state, same_end, same_states, train

TOWER = "sem_seg_head.prompts.tower."


@pytest.fixture
def towers(tmp_path) -> str:
    """One file with both towers of a tiny CLIP model, in open_clip's layout."""
    torch.manual_seed(5)
    features = [*BLOCKS, *CLIP]
    vision = VFMBackbone(
        name="tiny", weights="random", img_size=(64, 64), patch_size=16, out_features=features
    )
    state = {f"visual.trunk.{name}": value for name, value in vision.vit.state_dict().items()}
    text = TextTower("tiny", "random").text.state_dict()
    state |= {f"text.{name}": value for name, value in text.items()}
    save_file(state, tmp_path / "clip.safetensors")
    return str(tmp_path / "clip.safetensors")


@pytest.fixture
def text_cfg(tiny_cfg, towers):
    """Returns ``tiny_cfg`` with tqdm's head and both towers of ``towers``."""

    def make(**options):
        return tiny_cfg(
            **{
                "MODEL__VFM__WEIGHTS": towers,
                "MODEL__VFM__OUT_FEATURES": [*BLOCKS, *CLIP],
                "MODEL__TEXT__NAME": "tiny",
                "MODEL__TEXT__WEIGHTS": towers,
                "MODEL__SEM_SEG_HEAD__NAME": "TextQueryHead",
                "MODEL__SEM_SEG_HEAD__IN_FEATURES": list(BLOCKS),
            }
            | options
        )

    return make


def tower_of(state: dict) -> dict:
    return {k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}


@pytest.mark.parametrize("method", ["fishertune", "full", "freeze"])
def test_text_queries_train_resume_and_are_built_again(text_cfg, towers, method, tmp_path):
    cfg = text_cfg(TUNING__METHOD=method, SOLVER__ACCUMULATE=2, output=method)
    trainer = train(cfg)
    end = final_state(cfg.OUTPUT_DIR)
    losses = {"loss_language", "loss_vision", "loss_vision_language", "loss_ce", "loss_mask_0"}
    assert losses <= {*trainer.storage.latest()}
    scores = Run(Path(cfg.OUTPUT_DIR)).results.scores
    assert scores

    # The text tower is saved, and as it was in the file; the decoder and gamma have moved.
    own = tower_of(end["model"])
    public = {f"text.{k}": v for k, v in TextTower("tiny", towers).text.state_dict().items()}
    assert same_states(own, public)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for n, p in trainer.segmentor.named_parameters() if TOWER in n}

    # The backbone moves by its method alone.
    start = VFMBackbone(
        name="tiny", weights=towers, img_size=(48, 64), patch_size=16, out_features=[*BLOCKS, *CLIP]
    ).state_dict()
    changed = {
        n for n, t in start.items() if not torch.equal(t, end["model"][f"backbone.{n}"].cpu())
    }
    if method == "freeze":
        assert not changed
    if method == "full":
        assert {"vit.head.weight", "vit.norm.weight"} < changed
    if method == "fishertune":
        assert changed and all(".attn." in n or ".mlp." in n for n in changed)

    # Resumed in the middle of tuning it ends the same.
    whole = tmp_path / "whole"
    shutil.move(cfg.OUTPUT_DIR, whole)
    Path(cfg.OUTPUT_DIR).mkdir()
    train(cfg, stop=5)
    train(cfg, resume=True)
    assert same_end(cfg.OUTPUT_DIR, whole)

    # Built again from its checkpoint alone, also where the names have to be spelled out.
    cfg.MODEL.TEXT.WEIGHTS = "no such file"
    cfg.MODEL.TEXT.CLASSES = CLASSES
    again = build_trained(cfg, str(whole / "model_final.pth"))
    assert same_states(again.state_dict(), end["model"])
    assert (
        "clip_global_frozen" not in again.backbone.output_shape()
    )  # random weights would be in it
    batch = [{"image": torch.randint(0, 256, (3, 64, 64), generator=torch.manual_seed(1))}]
    expected = trainer.segmentor.eval()(batch)[0]["sem_seg"]
    torch.testing.assert_close(again(batch)[0]["sem_seg"], expected)


def test_a_warm_up_computes_no_gradient_of_the_backbone(text_cfg):
    cfg = text_cfg(SOLVER__MAX_ITER=3)
    model = train(cfg).segmentor
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.sem_seg_head.gamma.grad is not None


def test_an_export_holds_the_encoder_and_the_decoder_with_clips_head(text_cfg, towers, run_card):
    cfg = text_cfg()
    train(cfg)
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())
    delta = delta_of_run(cfg.OUTPUT_DIR, decoder=True)
    assert 0 < delta.changed and "backbone.vit.head.weight" in delta.decoder
    tuned = read_tuned(cfg.OUTPUT_DIR)
    assert "head.weight" not in tuned.vit
    whole = {f"backbone.vit.{name}": value for name, value in tuned.vit.items()} | tuned.decoder
    assert same_states(whole, final_state(cfg.OUTPUT_DIR)["model"])

    # The config of the plain files names the classes, because others lack the training set.
    export(["plain", cfg.OUTPUT_DIR, "--layout", "detectron2"])
    folder = Path(cfg.OUTPUT_DIR, "detectron2")
    assert read_config(str(folder / "config.yaml")).MODEL.TEXT.CLASSES == CLASSES
    assert same_states(run_card(folder)["model"].state_dict(), whole)


@pytest.mark.parametrize("method", ["fishertune", "full"])
def test_the_plan_counts_no_gradient_of_the_text_tower(text_cfg, method):
    cfg = text_cfg(TUNING__METHOD=method, MODEL__TEXT__WEIGHTS="no such file")
    plan = make_plan(cfg)
    assert not any(stage.uncounted for stage in plan.stages)
    model = build_empty(cfg, build_model)
    frozen = frozen_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p not in frozen)
    gradients = plan.stages[-1].memory.gradients
    assert gradients == 4 * trained if method == "full" else gradients < 4 * trained


def test_the_plan_counts_the_public_copy_of_the_image_tower(text_cfg):
    cfg = text_cfg(TUNING__METHOD="freeze")
    features = [name for name in cfg.MODEL.VFM.OUT_FEATURES if name != "clip_global_frozen"]
    without = ["MODEL.VFM.OUT_FEATURES", features, "MODEL.TEXT.VISION_WEIGHT", 0.0]
    one, other = (make_plan(each).stages for each in (cfg, changed(cfg, without)))
    copy = sum(p.nbytes for p in Trainer.build_model(cfg).backbone.vit.parameters())
    assert [stage.name for stage in one] == ["warmup", "tuning"]
    for stage, less in zip(one, other, strict=True):
        assert stage.memory.weights - less.memory.weights == copy > 0


def test_a_run_needs_the_names_of_its_classes(text_cfg):
    with pytest.raises(ValueError, match="MODEL.TEXT.CLASSES has 2 names"):
        Trainer(text_cfg(MODEL__TEXT__CLASSES=["sky", "road"]))


def test_methods_that_replace_learned_queries_refuse_this_head(text_cfg):
    with pytest.raises(ValueError, match="TextQueryHead has no learned queries"):
        Trainer(text_cfg(TUNING__METHOD="rein"))


def _one_of_two(rank: int, root: Path, folder: Path, cfg) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    _register(root)
    model = train(cfg).segmentor
    torch.save(model.state_dict(), folder / f"{rank}.pth")


@pytest.mark.parametrize("method", ["fishertune", "full"])
def test_two_processes_stay_equal_and_wait_for_no_unused_weight(
    text_cfg, tiny_data, tmp_path, method
):
    cfg = text_cfg(TUNING__METHOD=method, DATASETS__TEST=(), SOLVER__MAX_ITER=5)
    spawn(_one_of_two, (tiny_data, tmp_path, cfg), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    assert same_states(one, other)


def test_other_names_or_other_public_weights_are_refused(text_cfg, towers, tmp_path):
    """Both would change predictions, or what the losses pull towards, without a word."""
    names = {"MODEL__TEXT__CLASSES": ["ground", "wall", "sky"]}
    cfg = text_cfg(TUNING__METHOD="full", TUNING__WARMUP_ITERS=2, SOLVER__MAX_ITER=3, **names)
    train(cfg)
    weights = str(Run(Path(cfg.OUTPUT_DIR)).checkpoint)
    other = changed(cfg, ["MODEL.TEXT.CLASSES", ["wall", "ground", "sky"]])
    with pytest.raises(ValueError, match="read the class 'ground' and reads 'wall' .MODEL.TEXT"):
        build_trained(other, weights)

    words = "text tower, or the public copy of the backbone, had other weights"
    for key in ("MODEL.TEXT.WEIGHTS", "MODEL.VFM.WEIGHTS"):
        with pytest.raises(ValueError, match=words):
            Trainer(changed(cfg, [key, "random"])).resume_or_load(resume=True)
    warmup = f"{cfg.OUTPUT_DIR}/model_warmup.pth"
    options = ["OUTPUT_DIR", str(tmp_path / "b"), "TUNING.WARMUP_CHECKPOINT", warmup]
    with pytest.raises(ValueError, match=words):
        random_tower = changed(cfg, [*options, "MODEL.TEXT.WEIGHTS", "random"])
        Trainer(random_tower).resume_or_load(resume=False)
    Trainer(changed(cfg, options)).resume_or_load(resume=False)  # the same weights are taken over


def test_the_estimate_does_not_measure_the_distance_to_the_public_weights(text_cfg):
    """Eq. 6 shifts the backbone and not its public copy, so x' alone would have this loss."""

    def estimate(weight: float):
        cfg = text_cfg(MODEL__TEXT__VISION_WEIGHT=weight)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        generator = torch.manual_seed(1)
        batch = [
            {
                "image": torch.randint(0, 256, (3, 64, 64), generator=generator),
                "sem_seg": torch.randint(0, 3, (64, 64), generator=generator),
            }
            for _ in range(2)
        ]
        return estimate_fisher(
            model,
            [batch],
            image_losses.SegmentationLoss(),
            find_candidates(model.backbone),
            perturb=build_shift(cfg, model.backbone),
        )

    without, much = estimate(0.0), estimate(1000.0)
    assert same_states(without.f, much.f) and same_states(without.shifted, much.shifted)


def test_drawn_labels_cover_the_image_for_patches_of_14_pixels(text_cfg, monkeypatch):
    """A cell has 3.5 pixels, so 64 pixels are 19 cells of the 20 that cover 70 padded pixels."""
    cfg = text_cfg(MODEL__VFM__PATCH_SIZE=14, MODEL__VFM__IMG_SIZE=[70, 70])
    model, seen = build_model(cfg).train(), []
    draw = image_losses.sampled_nll

    def look(log_probabilities, seeds):
        seen.append(tuple(log_probabilities.shape[-2:]))
        return draw(log_probabilities, seeds)

    monkeypatch.setattr(image_losses, "sampled_nll", look)
    image = {"image": torch.zeros(3, 64, 64), "sem_seg": torch.zeros(64, 64, dtype=torch.int64)}
    image_losses.SegmentationLoss().sampled(model, [image])
    assert seen == [(19, 19)]
