import json
import re
import shutil
import subprocess
from base64 import b64decode
from collections import Counter
from html import escape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.analysis.page_figures import draw_curves, read_picture
from fishertune_d2.config import default_config
from fishertune_d2.data.labels import LabelSpace
from fishertune_d2.evaluation.label_pictures import draw_comparison
from fishertune_d2.fisher import FisherEstimate, Selection
from fishertune_d2.report import Run, RunError, main, write_report

DAY, NIGHT = "town_day", "town_night"
RESULTS = {
    "source": {DAY: 61.234},
    "targets": {NIGHT: 40.5},
    "target_average": 40.5,
    "per_class": {DAY: {"road": 90.0, "sky": 32.468}, NIGHT: {"road": 40.5}},
    "protocol": {
        "mode": "slide",
        "crop": [512, 512],
        "commit": "0123abc",
        "halved_labels": [],
        "test_size": {DAY: [1024, 512], NIGHT: None},
        "classes": {DAY: ["road", "sky"], NIGHT: ["road", "sky"]},
    },
    "tuned_parameters": 1_500_000,
    "backbone_parameters": 30_000_000,
}
LOG = """[11/21] detectron2 INFO: Environment info:
-----------  ---------
Python       3.11.7 (main, May  9 2026) [GCC]
PyTorch      2.15.0 @/home/someone/torch
Compiler     c++
-----------  ---------
PyTorch built with: nothing
"""


class _Page(HTMLParser):
    """Collects the tags, attributes and text of a page, as a browser sees them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.texts = Counter(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes
        if tag != "wbr":  # it may break a line, and parts no words
            self.texts.append(" ")

    def handle_endtag(self, tag):
        self.texts.append(" ")

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def _metrics(*iterations: int, **numbers: float) -> str:
    lines = [
        {"iteration": i, "total_loss": 9.0, "loss_ce": 1.0, "lr": 1e-4, **numbers}
        for i in iterations
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _write_run(folder: Path, results: dict | None = RESULTS, **options) -> Path:
    """Writes a run of 40 iterations, 20 of them warm-up, as train_net.py does."""
    folder.mkdir()
    cfg = default_config()
    tested = tuple(results["protocol"]["classes"]) if results else (DAY, NIGHT)
    options = {
        "DATASETS.TRAIN": (DAY,),
        "DATASETS.TEST": tested,
        "SOLVER.MAX_ITER": 40,
        "TUNING.WARMUP_ITERS": 20,
    } | options
    for key, value in options.items():
        cfg.merge_from_list([key, value])
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "log.txt").write_text(LOG)
    (folder / "metrics.json").write_text(_metrics(19, 39))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "pictures").mkdir()
        for name in tested:
            for k in range(3):
                Image.new("RGB", (90, 30), (0, 90, 0)).save(folder / "pictures" / f"{name}_{k}.png")
    return folder


def _add_fisher(folder: Path) -> None:
    torch.manual_seed(0)
    names = [f"blocks.{k}.attn.qkv.weight" for k in range(2)]
    f, shifted = ({name: torch.rand(12, 4) for name in names} for _ in range(2))
    FisherEstimate(f, shifted, 0.5, 4).save(folder / "fisher.safetensors")
    Selection.from_scores(f, 0.25, 96).save(folder / "selection.safetensors")


def _report(folder: Path) -> _Page:
    path = folder / "report.html"
    write_report(Run(folder), path)
    return _Page(path)


def test_a_finished_run(tmp_path):
    folder = _write_run(tmp_path / "run")
    _add_fisher(folder)
    page = _report(folder)
    assert (
        "fishertune on dinov2_vitl: mIoU 61.23 on the source, 40.50 on the unseen domain; 1.50 M "
        "weights tuned, equal to 5.0 % of the backbone's 30.00 M."
    ) in page.text
    assert "source town_day unseen town_night mIoU 61.23 40.50 road 90.00 40.50 sky 32.47 –" in (
        page.text
    )
    for part in ("Loss, and its parts", "Learning rate", "Sensitivity", "Selection"):
        assert part in page.text
    assert "crop 512, 512" in page.text and "commit 0123abc" in page.text
    assert "test size, town_day 1024 x 512 test size, town_night as stored" in page.text
    assert "Python 3.11.7 PyTorch 2.15.0" in page.text and "someone" not in page.text
    assert "Unfinished" not in page.text and "Not drawn" not in page.text
    assert page.tags["img"] == 2 * 3 * 3 + 2 + 2  # panels of the pictures, curves, maps


def test_the_map_shows_the_drf_that_selected(tmp_path, drawn):
    folder = _write_run(tmp_path / "run", **{"FISHER.FORM": "rank"})
    _add_fisher(folder)
    _report(folder)
    titles = [axes.get_title() for figure in drawn for axes in figure.axes]
    assert any(title.startswith("run, DRF (rank): ") for title in titles)


def test_the_page_needs_no_other_file(tmp_path):
    folder = _write_run(tmp_path / "run")
    _add_fisher(folder)
    page = _report(folder)
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "base", "form", "a"}
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources and all(value.startswith("data:image/") for value in sources)
    assert not {name for name, _ in page.attributes if name in ("href", "srcset", "data")}
    style = (folder / "report.html").read_text().split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_names_are_escaped(tmp_path):
    data_set, label = "<script>alert(1)<script>", '"><img src=x onerror="alert(2)">$\\frac$'
    results = {
        **RESULTS,
        "source": {data_set: 50.0},
        "targets": {},
        "target_average": None,
        "per_class": {data_set: {label: 50.0}},
        "protocol": {"commit": "{{ 7 * 7 }}", "classes": {data_set: [label]}},
    }
    folder = _write_run(tmp_path / "<b>$x^ & y$", results, **{"TUNING.METHOD": "<i>full"})
    numbers = {f"{data_set}/sem_seg/mIoU": 40.0}
    (folder / "metrics.json").write_text(_metrics(19, 39, **numbers))
    (folder / "log.txt").write_text(LOG.replace("3.11.7", "<u>3.11.7"))
    _add_fisher(folder)
    page = _report(folder)
    assert not page.tags.keys() & {"script", "b", "i", "u"}
    assert page.tags["img"] == 3 * 3 + 3 + 2
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name in (data_set, label, folder.name, "<i>full", "<u>3.11.7", "{{ 7 * 7 }}"):
        assert name in page.text
    assert escape(label) not in page.text  # once, not twice


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "rein"])
def test_without_a_selection_its_section_is_left_out(tmp_path, method):
    tuned = 0 if method == "freeze" else 5_000
    folder = _write_run(
        tmp_path / "run", {**RESULTS, "tuned_parameters": tuned}, **{"TUNING.METHOD": method}
    )
    page = _report(folder)
    assert "Selected weights" not in page.text
    assert ("none of the backbone's" in page.text) == (method == "freeze")


def test_the_page_says_what_the_checkpoint_recorded_of_the_training(tmp_path):
    recorded = {"method": "lora", "train": ["other_town"], "seed": 7, "iterations": 30}
    protocol = {**RESULTS["protocol"], **recorded}
    folder = _write_run(tmp_path / "run", {**RESULTS, "protocol": protocol})
    text = _report(folder).text
    assert "lora on dinov2_vitl" in text and "trained on other_town" in text and "seed 7" in text

    unknown = dict.fromkeys(recorded)
    results = {**RESULTS, "tuned_parameters": None, "protocol": {**protocol, **unknown}}
    text = _report(_write_run(tmp_path / "unknown", results)).text
    assert "how the weights were trained is not recorded" in text
    assert "unknown method on dinov2_vitl" in text and "seed not recorded" in text


def test_the_page_names_the_protocol(tmp_path):
    named = {**RESULTS, "protocol": {**RESULTS["protocol"], "name": "tqdm"}}
    text = _report(_write_run(tmp_path / "named", named)).text
    assert "protocol tqdm trained on" in text and "name tqdm" not in text
    assert "protocol" not in _report(_write_run(tmp_path / "unnamed")).text
    planned = _write_run(tmp_path / "planned", None, **{"TEST.PROTOCOL": "hrda"})
    text = _report(planned).text
    assert "protocol hrda trained on" in text and "class rule union" in text


def test_an_interrupted_run(tmp_path):
    folder = _write_run(tmp_path / "run", None)
    (folder / "metrics.json").write_text(_metrics(19, 29) + '{"iteration": 39, "total_')
    page = _report(folder)
    assert "Unfinished. The log ends after 30 of 40 iterations." in page.text
    assert f"--config-file {folder}/config.yaml --resume" in page.text
    assert "Scores" not in page.text and "Pictures" not in page.text
    assert "mode slide class rule present seed 42" in page.text  # of the config


def test_scores_of_an_unfinished_run_are_marked(tmp_path):
    folder = _write_run(tmp_path / "run")
    (folder / "metrics.json").write_text(_metrics(19))
    text = _report(folder).text
    assert "20 of 40 iterations, and the scores are from an evaluation during training" in text


def test_a_test_set_that_could_not_be_scored_is_named_and_no_average_is_shown(tmp_path):
    failed = {"town_fog": "fog/1.png: cannot be read. Copy it again."}
    text = _report(_write_run(tmp_path / "run", {**RESULTS, "failed": failed})).text
    assert "fishertune on dinov2_vitl; 1.50 M weights tuned" in text
    assert f"town_fog is not scored, so no average is shown: {failed['town_fog']}" in text
    assert "source town_day unseen town_night mIoU 61.23 40.50" in text


def test_a_run_that_has_logged_nothing(tmp_path):
    folder = _write_run(tmp_path / "run", None)
    for name in ("metrics.json", "log.txt"):
        (folder / name).unlink()
    page = _report(folder)
    assert "Unfinished. None of the 40 iterations has been logged" in page.text
    assert page.tags["img"] == 0 and "There is no log.txt" in page.text


def test_a_run_without_scores_and_one_without_training(tmp_path):
    trained = _write_run(tmp_path / "trained", None)
    assert "Not scored." in _report(trained).text
    assert f"--eval-only MODEL.WEIGHTS {trained}/model_final.pth" in _report(trained).text
    scored = _write_run(tmp_path / "scored")
    (scored / "metrics.json").unlink()
    assert "Only an evaluation." in _report(scored).text


def test_only_logged_numbers_have_curves(tmp_path):
    folder = _write_run(tmp_path / "run")
    numbers = {"fisher/tuned_share": 0.05, "lr_backbone": 1e-5, f"{DAY}/sem_seg/mIoU": 50.0}
    (folder / "metrics.json").write_text(_metrics(9, 19) + _metrics(29, 39, **numbers))
    titles = [title.split(",")[0] for title in draw_curves(Run(folder))]
    assert titles == [
        "Loss",
        "Learning rate",
        "Tuned share of the backbone",
        "mIoU during training",
    ]
    (folder / "metrics.json").write_text(_metrics(39, total_loss=float("nan")))
    assert len(draw_curves(Run(folder))) == 2


def test_a_data_set_has_its_own_pictures(tmp_path):
    folder = _write_run(tmp_path / "run")
    for name in (f"{DAY}_extra_0", f"{DAY}_10", f"{DAY}_x"):
        Image.new("RGB", (4000, 50)).save(folder / "pictures" / f"{name}.png")
    names = [path.stem for path in Run(folder).pictures(DAY)]
    assert names == [f"{DAY}_0", f"{DAY}_1", f"{DAY}_2", f"{DAY}_10"]
    _report(folder)
    assert len((folder / "report.html").read_text()) < 300_000


def test_a_picture_is_cut_into_titled_panels_and_its_legend(tmp_path):
    space = LabelSpace(
        ("road", "sky", "car"), ((128, 64, 128), (70, 130, 180), (0, 0, 9)), (0, 1, 2)
    )
    image = np.full((40, 60, 3), 255, np.uint8)
    image[-1, 0] = 200  # else the legend's margin would begin in a white image
    label, prediction = np.zeros((40, 60), np.uint8), np.full((40, 60), 2, np.uint8)
    draw_comparison(image, label, prediction, space, tmp_path / "picture.png")
    panels, legend = read_picture(tmp_path / "picture.png")
    assert list(panels) == ["image", "label", "prediction"]
    colours = []
    for uri in panels.values():
        panel = _decode(uri)
        assert panel.shape == (40, 60, 3)
        colours.append(panel[10, 30])
    assert np.abs(np.subtract(colours, [(255, 255, 255), *space.colors[::2]])).max() < 10
    names = _decode(legend)
    assert names.shape[1] == 180 and names.mean() > 128


def _decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(uri.partition(",")[2]))).convert("RGB")).astype(
        float
    )


def test_a_damaged_estimate_loses_only_its_map(tmp_path):
    folder = _write_run(tmp_path / "run")
    _add_fisher(folder)
    (folder / "fisher.safetensors").write_bytes(b"no tensors")
    page = _report(folder)
    assert re.search("Not drawn: .*fisher.safetensors cannot be used", page.text)
    assert page.tags["img"] == 2 * 3 * 3 + 2 + 1


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.yaml", None, "there is no .*config.yaml: name the OUTPUT_DIR of a run"),
        ("config.yaml", "a: [", "config.yaml is no config of a run"),
        ("config.yaml", "just text", "config.yaml is no config of a run"),
        ("config.yaml", "SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER is 'many', no number"),
        ("config.yaml", "x: !!python/object/apply:os.getcwd []", "is no config of a run"),
        ("results.json", "{", "results.json is not a file that an evaluation wrote .*--eval-only"),
        ("results.json", '{"source": {"a": 1}, "targets": {}}', "is not a file that an evaluation"),
        ("results.json", json.dumps({**RESULTS, "target_average": "40"}), "a score is no number"),
    ],
)
def test_damaged_files_end_in_one_sentence(tmp_path, capsys, file, content, message):
    folder = _write_run(tmp_path / "run")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(RunError, match=message):
        write_report(Run(folder), folder / "report.html")
    with pytest.raises(SystemExit, match="1"):
        main([str(folder)])
    assert capsys.readouterr().err.startswith("error: ")
    assert not (folder / "report.html").exists()


def test_the_command(tmp_path, capsys):
    folder = _write_run(tmp_path / "run")
    main([str(folder), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/page.html: 0.")
    with pytest.raises(SystemExit, match="1"):
        main([str(folder), "--output", str(tmp_path / "no/page.html")])
    assert "there is no such folder" in capsys.readouterr().err


_MEASURE = """<!DOCTYPE html><iframe width="390" height="800" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const images = [...page.images];
  document.body.innerHTML = "<p id=found>" + JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, images: images.length,
    shown: images.filter((image) => image.complete && image.naturalWidth).length,
    scrolled: page.querySelector("table").parentElement.scrollWidth,
    panels: Math.max(...[...page.querySelectorAll(".panels img")]
      .map((image) => image.getBoundingClientRect().right)),
  }}) + "</p>";
}});
</script>"""


def test_on_a_phone_in_a_real_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a browser: neither chromium nor google-chrome is on the PATH")
    domains = [DAY, NIGHT, *(f"a_data_set_with_a_rather_long_name_{k}" for k in range(5))]
    results = {
        **RESULTS,
        "targets": {name: 40.5 for name in domains[1:]},
        "per_class": {name: {"road": 40.5} for name in domains},
        "protocol": {"classes": {name: ["road"] for name in domains}, "commit": "0" * 200},
    }
    folder = _write_run(tmp_path / ("run" + "n" * 80), results)
    _add_fisher(folder)
    _report(folder)
    page = escape((folder / "report.html").read_text(encoding="utf-8"))
    (tmp_path / "measure.html").write_text(_MEASURE.format(page=page), encoding="utf-8")
    run = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
            (tmp_path / "measure.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(re.search(r"<p id=\"found\">(.*?)</p>", run.stdout)[1])
    assert 370 < found["width"] <= 390
    assert found["needed"] <= found["width"]
    assert found["scrolled"] > 390  # the table does, within its frame
    assert found["shown"] == found["images"] == 7 * 3 * 3 + 2 + 2
    assert found["panels"] <= found["width"]
    assert "CONSOLE" not in run.stderr
