"""A slip in a config is named with its file, its key and what was meant."""

import pytest

from fishertune_d2.config import CONFIGS, default_config, read_config
from fishertune_d2.config_slips import ConfigError, check_file, check_options, nearest

OPTIONS = {
    "a letter more": (["SOLVER.BASE_LRR", "1"], "BASE_LRR is no key; nearest: SOLVER.BASE_LR"),
    "no section": (["BASE_LR", "0.1"], "BASE_LR is no key; nearest: SOLVER.BASE_LR"),
    "small letters": (["solver.base_lr", "0.1"], "is no key; nearest: SOLVER.BASE_LR"),
    "another section": (["SOLVER.CROP.SIZE", "1"], "is no key; nearest: INPUT.CROP.SIZE"),
    "a section's letter": (["TUNNING.METHOD", "full"], "is no key; nearest: TUNING.METHOD"),
    "LazyConfig's": (["SOLVER.BASE_LR=0.1"], "in turn, as SOLVER.BASE_LR 0.1"),
    "no value": (["SEED", "1", "SOLVER.MAX_ITER"], "no value stands after SOLVER.MAX_ITER"),
    "a key as value": (
        ["SOLVER.MAX_ITER", "SOLVER.BASE_LR", "0.1"],
        "no value stands after SOLVER.MAX_ITER, but the key SOLVER.BASE_LR",
    ),
    "an option": (["SEED", "1", "--resume"], "--resume stands among the keys"),
    "a section": (["SOLVER", "5"], "SOLVER is a section"),
    "text for a number": (
        ["SOLVER.MAX_ITER", "many"],
        "SOLVER.MAX_ITER is 'many', text, and takes a whole number",
    ),
    "whole for a point": (["SOLVER.BASE_LR", "1"], "takes a number with a point: write 1.0"),
    "a small true": (["SOLVER.AMP.ENABLED", "true"], "takes True or False"),
    "a number for text": (["OUTPUT_DIR", "2024"], """write "'2024'" (with both quotation marks)"""),
    "text for a list": (["DATASETS.TEST", "my_val"], """takes a list: write "['my_val']\""""),
    "nothing": (["INPUT.RANDOM_FLIP", "None"], "no value, and takes text: write 'horizontal'"),
    "a base": (["_BASE_", "demo.yaml"], "_BASE_ works in files only"),
}  # fmt: skip


@pytest.mark.parametrize("slip", OPTIONS)
def test_a_slip_on_the_command_line_says_what_was_meant(slip):
    options, words = OPTIONS[slip]
    with pytest.raises(ConfigError) as error:
        read_config("demo.yaml", options)
    assert words in str(error.value)


FILES = {
    "a letter more": ("SOLVER: {BASE_LRR: 0.1}", "BASE_LRR is no key; nearest: SOLVER.BASE_LR"),
    "dots": ("SOLVER.BASE_LR: 0.1", "is nested in a file: write SOLVER: {BASE_LR: ...}"),
    "a section twice": ("SOLVER: {MAX_ITER: 5}\nSOLVER: {BASE_LR: 0.1}", "line 2: SOLVER stands"),
    "a key twice": ("SOLVER:\n  BASE_LR: 0.1\n  BASE_LR: 0.2", "line 3: BASE_LR stands twice"),
    "no value": ("SOLVER: {BASE_LR: }", "SOLVER.BASE_LR is None, no value, and takes a number"),
    "a value for a section": ("SOLVER: 5", "SOLVER is a section, and got 5"),
    "a section for a value": ("SEED: {A: 1}", "SEED is {'A': 1}, a section, and takes a whole"),
    "a list": ("- SOLVER", "holds a list, not keys and values"),
    "text": ("SOLVER", "holds a str, not keys and values"),
    "nothing": ("# SOLVER", "is empty, not keys and values"),
    "a tab": ("SOLVER:\n\tBASE_LR: 0.1", "line 2: a tab: YAML takes spaces alone"),
    "not closed": ("SOLVER: [", "is no YAML that can be read: line 2"),
    "a date": ("DATASETS: {TEST: 2020-01-01}", "DATASETS.TEST is datetime.date(2020, 1, 1)"),
    "no base": ("_BASE_: gone.yaml", "its _BASE_ is "),
    "base is no path": ("_BASE_: 3", "its _BASE_ is 3, and takes the path of a file"),
    "base of itself": ("_BASE_: slip.yaml", "its _BASE_ slip.yaml leads back to itself"),
    "a newer version": ("VERSION: 3", "Cannot merge a v3 config into a v2 config"),
}  # fmt: skip


@pytest.mark.parametrize("slip", FILES)
def test_a_slip_in_a_file_says_where_it_is(slip, tmp_path):
    text, words = FILES[slip]
    file = tmp_path / "slip.yaml"
    file.write_text(f"{text}\n")
    with pytest.raises(ConfigError) as error:
        read_config(str(file))
    assert str(error.value).startswith(str(file)) and words in str(error.value)


def test_a_slip_in_a_base_names_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("TUNING: {METOD: full}\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\nSEED: 1\n")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/base.yaml: TUNING.METOD is no key"):
        read_config(str(tmp_path / "mine.yaml"))


def test_what_is_no_yaml_at_all_is_said(tmp_path):
    for name, content, words in (
        ("model.pth", bytes(range(256)), "is no text"),
        ("lazy.py", b"cfg = {}\n", "is Python, as of LazyConfig"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} {words}"):
            read_config(str(tmp_path / name))


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_has_no_slip(file):
    check_file(str(file), default_config())


def test_values_that_detectron2_takes_are_no_slips(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: &s {BASE_LR: 1e-3}\n")
    file = tmp_path / "mine.yaml"
    file.write_text('_BASE_: ["base.yaml"]\nINPUT: {CROP: {SIZE: "32, 64"}}\n')
    options = ["DATASETS.TEST", "('a',)", "OUTPUT_DIR", "a=b", "SOLVER.WEIGHT_DECAY_BIAS", "0.1"]
    cfg = read_config(str(file), options)
    assert (cfg.SOLVER.BASE_LR, cfg.INPUT.CROP.SIZE) == (1e-3, [32, 64])
    assert (cfg.DATASETS.TEST, cfg.OUTPUT_DIR) == (("a",), "a=b")
    check_options(["SOLVER.WEIGHT_DECAY_BIAS", None, "SEED", 3], default_config())
    (tmp_path / "old.yaml").write_text("VERSION: 1\nSOLVER: {BASE_LR: 0.5}\n")
    assert read_config(str(tmp_path / "old.yaml")).SOLVER.BASE_LR == 0.5


def test_the_nearest_names_come_first():
    methods = ["freeze", "full", "fisher", "fishertune", "childtune"]
    assert nearest("fishertun", methods) == ["fishertune"]
    assert nearest("FULL", methods) == ["full"]
    assert nearest("adamw", methods) == [] == nearest("full", [])
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "SEED"]
    assert set(nearest("MODEL.NUM_CLASSES", classes)) == set(classes[:2])


def test_a_config_is_read_as_detectron2_reads_it():
    for path in (CONFIGS / "demo.yaml", CONFIGS / "camvid/fishertune.yaml"):
        expected = default_config()
        expected.merge_from_file(str(path))
        assert read_config(str(path)) == expected


def test_values_need_not_be_texts():
    sizes = [["streets_fog_val", [96, 128]]]
    assert read_config("demo.yaml", ["TEST.SIZES", sizes]).TEST.SIZES == sizes
