"""Names of classes where only another process has registered the data set."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fishertune_d2.data.labels import CITYSCAPES
from fishertune_d2.predict import Predictor, read_run
from fishertune_d2.predict.classes import recorded_space, registered_space

NAMES = ["road", "wall", "sky"]


@pytest.fixture
def unknown_run(make_run):
    """A run on my_town, which is not registered here, and a function that writes its results."""
    cfg = make_run(DATASETS__TEST=("my_town",))

    def write(classes, size=None, name="my_town") -> Path:
        path = Path(cfg.OUTPUT_DIR) / "results.json"
        results = {
            "source": {name: 50.0},
            "targets": {},
            "target_average": None,
            "per_class": {name: dict.fromkeys(classes, 50.0)},
            "protocol": {"classes": {name: classes}, "test_size": {name: size}},
            "backbone_parameters": 9,
            "tuned_parameters": 1,
        }
        path.write_text(json.dumps(results))
        return path

    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    return cfg, write


def test_names_and_size_are_those_that_the_run_wrote_down(unknown_run, image, caplog):
    cfg, write = unknown_run
    write(NAMES, size=[98, 70])
    predictor = Predictor(read_run(f"{cfg.OUTPUT_DIR}/config.yaml"))
    assert predictor.space.classes == tuple(NAMES) and predictor.size == (98, 70)
    assert predictor.space.colors == tuple(CITYSCAPES[name] for name in NAMES)
    assert predictor(image).classes.shape == (40, 56)
    assert "numbers" not in caplog.text


def test_the_checkpoint_goes_before_the_results(unknown_run):
    cfg, write = unknown_run
    write(NAMES)
    assert recorded_space(cfg, ["a", "b", "c"])[0].classes == ("a", "b", "c")


def test_test_sizes_of_the_config_go_before_those_of_the_run(unknown_run):
    cfg, write = unknown_run
    write(NAMES, size=[98, 70])
    cfg.TEST.SIZES = [["my_town", 140, 105]]
    assert recorded_space(cfg)[1] == (140, 105)
    cfg.TEST.SIZES = [["my_town", 140]]
    with pytest.raises(ValueError, match=r"TEST\.SIZES holds \['my_town', 140\]: write"):
        recorded_space(cfg)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (None, "(my_town) is registered here"),
        (["day", "night"], "results.json names the 2 classes in which my_town was scored, and"),
    ],
)
def test_classes_have_numbers_where_no_name_fits(unknown_run, caplog, classes, words):
    cfg, write = unknown_run
    if classes:
        write(classes)
    assert recorded_space(cfg)[0].classes == ("class 0", "class 1", "class 2")
    assert words in caplog.text and "call register_sem_seg first" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"protocol": 3}'])
def test_a_damaged_record_names_nothing(unknown_run, text):
    cfg, write = unknown_run
    write(NAMES).write_text(text)
    assert recorded_space(cfg)[0].classes[0] == "class 0"


def test_another_data_sets_record_names_nothing(unknown_run):
    cfg, write = unknown_run
    write(NAMES, name="my_village")
    assert recorded_space(cfg)[0].classes[0] == "class 0"


def test_a_data_set_of_detectron2s_own_catalog_names_its_classes(make_run):
    DatasetCatalog.register("my_stuff", list)
    MetadataCatalog.get("my_stuff").set(stuff_classes=NAMES, ignore_label=255)
    try:
        cfg = make_run(DATASETS__TEST=("my_stuff",))
        space, size = registered_space(cfg)
        assert space.classes == tuple(NAMES) and size is None
        MetadataCatalog.pop("my_stuff")
        assert registered_space(cfg) is None  # it does not say which classes it has
    finally:
        DatasetCatalog.remove("my_stuff")
        MetadataCatalog.remove("my_stuff")
