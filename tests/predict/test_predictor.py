import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from PIL import Image

from fishertune_d2.data import SegmentationMapper
from fishertune_d2.engine import WholeCheckpointer
from fishertune_d2.export import read_tuned
from fishertune_d2.export.layouts import LAYOUTS
from fishertune_d2.predict import InputError, Predictor, read_run
from fishertune_d2.predict.predictor import confidence_of
from fishertune_d2.tuning import build_tuning_method


def _read(cfg, *options: str):
    return read_run(Path(cfg.OUTPUT_DIR) / "config.yaml", options)


def _evaluated(cfg) -> torch.Tensor:
    """Scores of the data set's image, as train_net.py --eval-only computes them."""
    cfg.MODEL.VFM.WEIGHTS = "random"
    model = build_model(cfg).eval()
    checkpointer = WholeCheckpointer(model, method=build_tuning_method(cfg))
    checkpointer.resume_or_load(str(Path(cfg.OUTPUT_DIR) / "model_final.pth"), resume=False)
    (item,) = DatasetCatalog.get("town")
    (output,) = model([SegmentationMapper(cfg, is_train=False)(item)])
    return output["sem_seg"].cpu()


@pytest.mark.parametrize("method", ["fishertune", "lora", "rein", "vpt"])
def test_predicts_what_is_evaluated(make_run, town, image, method):
    cfg = make_run(TUNING__METHOD=method)
    prediction = Predictor(_read(cfg))(image)
    scores = _evaluated(cfg)
    assert np.ptp(prediction.confidence) > 1e-3  # or any model would do
    np.testing.assert_array_equal(prediction.classes, scores.argmax(0).numpy())
    np.testing.assert_array_equal(prediction.confidence, confidence_of(scores).numpy())


def test_channels_in_the_order_that_the_model_was_trained_on(make_run, town, image):
    cfg = make_run(INPUT__FORMAT="BGR")
    np.testing.assert_array_equal(
        Predictor(_read(cfg))(image).classes, _evaluated(cfg).argmax(0).numpy()
    )


def test_sliding_windows_and_sizes_of_the_config(make_run, town, image):
    cfg = make_run(
        TEST__MODE="slide", TEST__CROP_SIZE=[48, 64], TEST__STRIDE=[32, 32],
        TEST__SIZES=[["town", 140, 105]],
    )  # fmt: skip
    predictor = Predictor(_read(cfg))
    assert predictor.size == (140, 105)
    scores = _evaluated(cfg)
    np.testing.assert_array_equal(predictor(image).classes, scores.argmax(0).numpy())


def test_predicts_under_the_autocast_of_the_training(make_run, town, image):
    cfg = make_run(SOLVER__AMP__ENABLED=True)
    prediction = Predictor(_read(cfg))(image)
    exact = confidence_of(_evaluated(cfg)).numpy()
    with torch.autocast(torch.device(cfg.MODEL.DEVICE).type, torch.bfloat16):
        scores = _evaluated(cfg)
    np.testing.assert_array_equal(prediction.classes, scores.argmax(0).numpy())
    np.testing.assert_array_equal(prediction.confidence, confidence_of(scores).numpy())
    assert not np.array_equal(prediction.confidence, exact)


def test_classes_are_those_that_the_data_set_is_scored_in(make_run, image):
    cfg = make_run(DATASETS__TEST=("camvid_dusk_dev",), MODEL__SEM_SEG_HEAD__NUM_CLASSES=19)
    predictor = Predictor(_read(cfg))
    assert predictor.space.classes[:2] == ("sky", "building")
    assert predictor(image).classes.max() < 11


def test_an_exported_plain_file(make_run, town, image, tmp_path):
    cfg = make_run(TUNING__METHOD="lora")
    expected = Predictor(_read(cfg))(image)
    LAYOUTS["detectron2"](read_tuned(cfg.OUTPUT_DIR), tmp_path / "plain")
    weights = str(tmp_path / "plain/model.pth")
    prediction = Predictor(_read(cfg, "MODEL.WEIGHTS", weights))(image)
    # Merged weights round differently.
    np.testing.assert_allclose(prediction.confidence, expected.confidence, atol=1e-4)


def test_weights_that_are_named_go_before_those_beside_the_config(make_run, town):
    cfg = make_run(MODEL__WEIGHTS="/gone/where_it_started.pth")
    own = f"{cfg.OUTPUT_DIR}/model_final.pth"
    assert _read(cfg).MODEL.WEIGHTS == own
    other = f"{make_run('other').OUTPUT_DIR}/model_final.pth"
    assert _read(cfg, "SEED", "1", "MODEL.WEIGHTS", other).MODEL.WEIGHTS == other


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([1.0, 0.0, 0.0], 1.0),  # one class claims the pixel
        ([0.25, 0.05, 0.0], 0.25),  # hardly any query does: what is missing is doubt
        ([2.0, 1.0, 1.0], 0.5),  # several queries do
        ([0.0, 0.0, 0.0], 0.0),
    ],
)
def test_confidence_of_known_scores(scores, expected):
    assert confidence_of(torch.tensor(scores)[:, None, None]).item() == pytest.approx(expected)


def test_no_weights(make_run, town):
    cfg = make_run()
    weights = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    weights.rename(weights.with_name("model_preempted.pth"))
    with pytest.raises(ValueError, match="no model_final.pth beside it: add --opts MODEL.WEIGHTS"):
        _read(cfg)
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS is away.pth"):
        _read(cfg, "MODEL.WEIGHTS", "away.pth")


def test_an_unfinished_run_does_not_predict_with_the_weights_from_which_it_started(make_run, town):
    start = f"{make_run('start').OUTPUT_DIR}/model_final.pth"
    cfg = make_run(MODEL__WEIGHTS=start)
    folder = Path(cfg.OUTPUT_DIR)
    own = (folder / "model_final.pth").rename(folder / "model_0000009.pth")
    assert _read(cfg).MODEL.WEIGHTS == start  # the folder of an evaluation
    (folder / "metrics.json").touch()
    with pytest.raises(ValueError, match=f"no model_final.pth of .* yet, .* started, {start}: add"):
        _read(cfg)
    assert _read(cfg, "MODEL.WEIGHTS", str(own)).MODEL.WEIGHTS == str(own)


def test_weights_of_another_number_of_classes(make_run, town):
    cfg, other = make_run(), make_run("other", MODEL__SEM_SEG_HEAD__NUM_CLASSES=5)
    weights = f"{other.OUTPUT_DIR}/model_final.pth"
    with pytest.raises(ValueError, match="predict 5 classes and the config asks for 3: set MODEL"):
        Predictor(_read(cfg, "MODEL.WEIGHTS", weights))


def test_weights_that_leave_a_part_of_the_model_random(make_run, town):
    cfg = make_run()
    path = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    state = torch.load(path, weights_only=True)["model"]
    torch.save({n: t for n, t in state.items() if n.startswith("backbone.")}, path)
    with pytest.raises(
        ValueError, match=r"model_final.pth: .* do not fill the model.*sem_seg_head"
    ):
        Predictor(_read(cfg))


def test_an_image_far_larger_than_those_of_the_training_gets_one_warning(make_run, town, caplog):
    predictor = Predictor(_read(make_run(INPUT__CROP__SIZE=[16, 16], TEST__SIZES=[])))
    picture = np.zeros((48, 64, 3), np.uint8)
    predictor.size = (50, 50)
    predictor(picture)
    assert "in one piece" not in caplog.text
    predictor.size = None
    for _ in range(2):
        predictor(picture)
    (said,) = [r.getMessage() for r in caplog.records if "in one piece" in r.getMessage()]
    assert said.startswith("An image of 64 x 48 pixels") and "12 times what" in said
    assert "--opts TEST.MODE slide" in said and "TEST.SIZES \"[['town', 1024, 512]]\"" in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory"
        ),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_says_what_needs_less(make_run, town, image, monkeypatch, error):
    def fail(inputs):
        raise error

    predictor = Predictor(_read(make_run()))
    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(InputError, match="not enough for an image of 56 x 40 .*TEST.MODE slide"):
        predictor(image)
    predictor = Predictor(_read(make_run("windows", TEST__MODE="slide")))
    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(InputError, match=r"pixels: add --opts TEST.SIZES"):
        predictor(image)
    predictor = Predictor(_read(make_run("named", TEST__MODE="slide", TEST__PROTOCOL="tqdm")))
    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(InputError, match=r"pixels: add --opts TEST.PROTOCOL '' TEST.SIZES"):
        predictor(image)


def test_another_error_stays_what_it_is(make_run, town, image, monkeypatch):
    def fail(inputs):
        raise RuntimeError("shapes do not fit")

    predictor = Predictor(_read(make_run()))
    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        predictor(image)


def test_a_data_set_of_other_classes(make_run, town):
    cfg = make_run(DATASETS__TEST=("cityscapes_val",))
    with pytest.raises(ValueError, match="cityscapes_val has 19 classes and .* is 3: set DATASETS"):
        Predictor(_read(cfg))


def test_no_gpu(make_run, town, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = make_run()
    with pytest.raises(ValueError, match="add MODEL.DEVICE cpu to the command"):
        Predictor(_read(cfg, "MODEL.DEVICE", "cuda"))


def test_the_example_of_getting_started(make_run, town, image, monkeypatch, tmp_path, capsys):
    (tmp_path / "outputs").mkdir()
    make_run("outputs/demo", DATASETS__TEST=(town,))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(image).save("street.jpg")
    page = (Path(__file__).resolve().parents[2] / "GETTING_STARTED.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*Predictor\([^`]*)```", page)
    variables: dict = {}
    exec(compile(example, "GETTING_STARTED.md", "exec"), variables)
    prediction, names = variables["prediction"], variables["predictor"].space.classes
    assert prediction.classes.shape == prediction.confidence.shape == image.shape[:2]
    assert prediction.classes.max() < len(names) and str(names) in capsys.readouterr().out
