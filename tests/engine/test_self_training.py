"""Self-training through the real trainer: the teacher, its labels, and a run that resumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from PIL import Image

from fishertune_d2.config import changed
from fishertune_d2.data import register_sem_seg
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.loaders import training_loader
from fishertune_d2.engine.self_training import SelfTraining
from fishertune_d2.modeling.heads import in_eval_mode
from fishertune_d2.streets import render_scene

from .conftest import CLASSES, final_state, same_end, train

LEAN = {"DATASETS__TEST": (), "SOLVER__CHECKPOINT_PERIOD": 1, "SELF_TRAINING__PERIOD": 2}


@pytest.fixture
def folder(tmp_path) -> str:
    """Five images of several sizes, one in a folder below."""
    rng = np.random.default_rng(1)
    place = tmp_path / "unlabelled"
    (place / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "c.jpg", "d.png", "more/e.png")):
        pixels = rng.integers(0, 200, (40 + 12 * i, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / name)
    return str(place)


class Watch(HookBase):
    """Keeps each step's batch, the head before and after the teacher labels, and after the step."""

    def __init__(self, trainer):
        self.batches, self.heads, self.teachers = [], [], []
        (self.hook,) = [h for h in trainer._hooks if isinstance(h, SelfTraining)]
        label = self.hook.before_step

        def before_step():
            before = self._head(trainer)
            label()
            after = self._head(trainer)
            assert all(torch.equal(before[name], after[name]) for name in before)
            self._keep(trainer)

        self.hook.before_step = before_step

    @staticmethod
    def _head(trainer):
        head = trainer.segmentor.sem_seg_head
        return {name: p.detach().clone() for name, p in head.named_parameters()}

    def _keep(self, trainer):
        if trainer.iter < self.hook.start:
            return
        batch = trainer._trainer.draw()
        self.batches.append(batch)
        for item in batch:
            if "clean_image" in item:
                self._check(trainer, item)

    def _check(self, trainer, item):
        """The label is the teacher's argmax on the clean copy, in a model of its own."""
        model, (height, width) = trainer.segmentor, item["valid_size"]
        student = self._head(trainer)
        model.sem_seg_head.load_state_dict(self.hook.teacher, strict=False)
        with in_eval_mode(model), torch.no_grad():
            expected = model.scores(item["clean_image"][:, :height, :width]).argmax(0)
        model.sem_seg_head.load_state_dict(student, strict=False)
        assert torch.equal(item["sem_seg"][:height, :width].long(), expected)
        assert (item["sem_seg"][height:] == 255).all() and (item["sem_seg"][:, width:] == 255).all()
        assert expected.max() < len(CLASSES)

    def after_step(self):
        if self.trainer.iter >= self.hook.start:
            self.heads.append(self._head(self.trainer))
            self.teachers.append({n: t.clone() for n, t in self.hook.teacher.items()})


def watched(cfg):
    """A trainer whose self-training is watched, after it has trained."""
    trainer = Trainer(cfg)
    watch = Watch(trainer)
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize(
    ("method", "head"),
    [("freeze", "Mask2FormerHead"), ("rein", "Mask2FormerHead"), ("full", "SemSegFPNHead")],
)
def test_the_teacher_labels_and_follows(tiny_cfg, folder, method, head):
    cfg = tiny_cfg(
        **LEAN, TUNING__METHOD=method, SELF_TRAINING__IMAGES=folder, SELF_TRAINING__EMA=0.75,
        SOLVER__MAX_ITER=9, MODEL__SEM_SEG_HEAD__NAME=head,
    )  # fmt: skip
    _, watch = watched(cfg)
    items = [item for batch in watch.batches for item in batch]
    assert ["clean_image" in item for item in items] == [i % 3 > 0 for i in range(12)]
    # teacher = d * teacher + (1 - d) * head after every second step, and still between them.
    teacher = None
    for i, (heads, found) in enumerate(zip(watch.heads, watch.teachers, strict=True)):
        if teacher is None:
            teacher = {name: t.double() for name, t in found.items()}  # the start, at i = 0
        elif i % 2:
            teacher = {n: 0.75 * t + 0.25 * heads[n].double() for n, t in teacher.items()}
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), teacher[name], rtol=1e-5, atol=1e-7)
    last = watch.heads[-1]
    assert any(not torch.equal(last[name], found[name]) for name in found)


@pytest.mark.parametrize("method", ["fishertune", "full"])
def test_a_resumed_run_is_an_unbroken_one(tiny_cfg, folder, method):
    keys = LEAN | {"SELF_TRAINING__IMAGES": folder, "SELF_TRAINING__EMA": 0.5}
    keys |= {"TUNING__METHOD": method, "TUNING__FEATURE_PERTURBATION": method == "full"}
    keys |= {"SOLVER__EMA": 0.9}
    whole, parts = tiny_cfg("whole", **keys), tiny_cfg("parts", **keys)
    train(whole)
    train(parts, stop=6)
    train(parts, resume=True)
    assert same_end(whole.OUTPUT_DIR, parts.OUTPUT_DIR)
    states = [final_state(cfg.OUTPUT_DIR) for cfg in (whole, parts)]
    teachers = [state["trainer"]["hooks"]["SelfTraining"] for state in states]
    assert teachers[0].keys() == teachers[1].keys() and len(teachers[0]) > 20
    assert all(torch.equal(teachers[0][name], teachers[1][name]) for name in teachers[0])
    names = {name.removeprefix("sem_seg_head.") for name in states[0]["model"]}
    assert teachers[0].keys() <= names
    Image.new("RGB", (70, 50)).save(Path(folder) / "f.png")
    with pytest.raises(ValueError, match="the images of SELF_TRAINING.IMAGES are others"):
        train(parts, resume=True)


def test_refuses_what_cannot_work(tiny_cfg, folder):
    keys = LEAN | {"TUNING__METHOD": "freeze", "SELF_TRAINING__IMAGES": folder}
    for change, message in (
        ({"TUNING__WARMUP_ITERS": 0}, "a head that has learned nothing"),
        ({"SELF_TRAINING__EMA": 1.0}, "SELF_TRAINING.EMA is 1.0"),
        ({"SELF_TRAINING__RATIO": 0}, "SELF_TRAINING.RATIO 0"),
        ({"SELF_TRAINING__IMAGES": folder + "/none"}, "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_cfg(**keys | change))


def test_refuses_a_trainers_own_loader_without_the_images(tiny_cfg, folder):
    class OwnLoader(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return training_loader(changed(cfg, ["SELF_TRAINING.IMAGES", ""]))

    cfg = tiny_cfg(**LEAN, TUNING__METHOD="freeze", SELF_TRAINING__IMAGES=folder)
    with pytest.raises(ValueError, match="has no images without labels"):
        OwnLoader(cfg)


@pytest.fixture
def streets_day(tmp_path):
    """Four scenes of the built-in streets by day, with Cityscapes' 19 classes."""
    for folder in ("images", "labels"):
        (tmp_path / "day" / folder).mkdir(parents=True)
    for seed in range(4):
        image, label = render_scene(seed, "day", (192, 96))
        Image.fromarray(image).save(tmp_path / "day/images" / f"{seed}.png")
        Image.fromarray(label).save(tmp_path / "day/labels" / f"{seed}.png")
    classes = [f"class {i}" for i in range(19)]
    register_sem_seg("some_streets_day", tmp_path / "day/images", tmp_path / "day/labels", classes)
    yield "some_streets_day"
    DatasetCatalog.remove("some_streets_day")
    MetadataCatalog.remove("some_streets_day")


def test_camvid_without_labels_joins_the_streets_by_day(tiny_cfg, streets_day, shared_dir):
    """The source has labels; the folder is CamVid's training images, whose labels nobody reads."""
    keys = {
        "DATASETS__TRAIN": (streets_day,), "DATASETS__TEST": (), "TUNING__METHOD": "freeze",
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 19, "SOLVER__CHECKPOINT_PERIOD": 1,
        "MODEL__VFM__NAME": "tiny_convnext", "INPUT__MIN_SIZE_TRAIN": [96],
        "INPUT__CROP__SIZE": [64, 64], "SELF_TRAINING__PERIOD": 1,
        "SELF_TRAINING__IMAGES": str(shared_dir / "datasets/CamVid/train"),
    }  # fmt: skip
    whole, parts = tiny_cfg("whole", **keys), tiny_cfg("parts", **keys)
    trainer = train(whole)
    assert len(trainer.data_loader.dataset.unlabelled) == 367
    train(parts, stop=5)
    train(parts, resume=True)
    assert same_end(whole.OUTPUT_DIR, parts.OUTPUT_DIR)
