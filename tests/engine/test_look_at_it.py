"""What one looks at after training: the report of a real run, and its model on an image."""

import json
from pathlib import Path

import numpy as np
import torch

from fishertune_d2.data import SegmentationMapper, load_datasets
from fishertune_d2.engine import Trainer
from fishertune_d2.predict import Predictor, read_run
from fishertune_d2.report import Run, write_report


def test_a_real_run(tiny_cfg):
    cfg = tiny_cfg()
    folder = Path(cfg.OUTPUT_DIR)
    (folder / "config.yaml").write_text(cfg.dump())
    trainer = Trainer(cfg)
    trainer.train()

    item = load_datasets(["tiny_night"])[0]
    inputs = SegmentationMapper(cfg, is_train=False)(item)
    with torch.no_grad():
        (output,) = trainer.segmentor.eval()([inputs])
    predictor = Predictor(read_run(folder / "config.yaml"))
    seen = predictor(inputs["image"].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(seen.classes, output["sem_seg"].argmax(0).cpu().numpy())
    assert predictor.space.classes == ("ground", "wall", "sky")

    run = Run(folder)
    assert run.trained and run.series("total_loss")[-1][0] == 6
    assert [path.name for path in run.pictures("tiny_night")] == ["tiny_night_0.png"]
    write_report(run, folder / "report.html")
    page = (folder / "report.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    for score in (*results["source"].values(), results["target_average"]):
        assert f"<strong>{score:.2f}</strong>" in page
    for part in ("Sensitivity", "Selection", "Tuned share of the backbone"):
        assert part in page
    assert "Unfinished" not in page and "Not drawn" not in page
