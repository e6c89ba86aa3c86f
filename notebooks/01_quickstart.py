# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Quickstart: from nothing to a table and pictures
#
# A model that segments streets by day fails at night. FisherTune (CVPR 2025) starts from a vision
# foundation model, here DINOv2 ViT-S/14, and lets only the weights move that matter for the task
# and react to a simulated change of domain: 5 % of the backbone. This notebook trains on street
# scenes by day, which are drawn on the spot, and scores on the same streets by day, at night and
# in snow.
#
# Nothing but the set-up of the README is needed: no GPU and no data. The first run fetches 90 MB
# of weights and draws the scenes, which takes a minute or two each.

# %%
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "../datasets")

from detectron2.data import DatasetCatalog
from IPython.display import Image

from fishertune_d2.analysis.selection_map import draw_run
from fishertune_d2.config import read_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.output_dir import remove_run

# %% [markdown]
# ## One config
#
# An experiment is one file, as in Detectron2. [streets.yaml](streets.yaml) is the demo's with
# smaller images and fewer iterations. (`quick.yaml`, a toy model, is for the project's tests.)

# %%
QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # the project's tests set it
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

output = OUTPUT / "quickstart"
cfg = read_config(CONFIG, ["OUTPUT_DIR", str(output)])
output.mkdir(parents=True, exist_ok=True)
for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
    print(f"{name:20} {len(DatasetCatalog.get(name)):4} pairs of image and label")

# %% [markdown]
# ## Three stages, one trainer
#
# Training goes through the three stages of the paper's Algorithm 1:
#
# 1. **Warm-up**: the backbone is frozen, the decoder trains for $T_1$ iterations.
# 2. **Estimation**: on $T_2$ batches the *domain-related Fisher information* (DRF) of every
#    candidate weight is measured. No weight changes.
# 3. **Tuning**: for $T_3$ iterations the decoder and the weights of the highest DRF train. Their
#    share grows from $d_\min$ to $d_\max$.

# %%
t1, total = cfg.TUNING.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
print(f"T1 = {t1} iterations, T2 = {cfg.FISHER.BATCHES} batches, T3 = {total - t1} iterations")
print(f"d_min = {cfg.TUNING.D_MIN:.0%}, d_max = {cfg.TUNING.D_MAX:.0%} of the backbone")

# %% [markdown]
# The trainer is Detectron2's `DefaultTrainer` with these stages as hooks. What it logs says how
# many weights are in the optimizer in each stage, and where those lie that were tuned in the end.

# %%
log = logging.getLogger("fishertune_d2.engine")
log.addHandler(logging.StreamHandler(sys.stdout))
log.setLevel(logging.INFO)

remove_run(output)  # what an earlier execution left
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()

# %% [markdown]
# ## The table
#
# Test sets of the domain that was trained on are the *source*, the others are *unseen*; what
# counts is the average over the unseen ones. The log above ends with the table by data set and
# class, and `results.json` holds it, with the protocol:

# %%
results = json.loads((output / "results.json").read_text())
for name, score in {**results["source"], **results["targets"]}.items():
    print(f"{name:20} mIoU {score:5.2f} %")
print(f"{'average over unseen':20} mIoU {results['target_average']:5.2f} %")

# %% [markdown]
# These are the scores of a minute of training: the classes that fill the image are learnt, the
# small ones are not. Do not read a ranking of methods out of such a run;
# [docs/results/camvid.md](../docs/results/camvid.md) has longer ones.
#
# ## The pictures
#
# From left to right image, label and prediction, with the colours of Cityscapes. What to see: by
# day the large regions are found; in snow pieces of them are lost, and at night far more, the sky
# first.

# %%
Image(filename=output / "pictures/streets_day_val_1.png", width=840)

# %%
Image(filename=output / "pictures/streets_night_val_1.png", width=840)

# %%
Image(filename=output / "pictures/streets_snow_val_1.png", width=840)

# %% [markdown]
# ## What was tuned
#
# The map shows which share of each group (a block's query, key, value or feed-forward weights)
# was selected. What to see: the choice is far from even. Values and feed-forward layers of the
# first half hold nearly all of it. (After so short a warm-up it is nearly that of F alone, as the
# log says above; [05_fisher](05_fisher.ipynb) is about that.)

# %%
Image(filename=draw_run(output), width=760)

# %% [markdown]
# ## Something to try
#
# - Put `"TUNING.METHOD", "full"` or `"freeze"` into the options of `read_config`, with another
#   `OUTPUT_DIR`, and compare: `python -m fishertune_d2.analysis.compare
#   outputs/notebooks/quickstart outputs/notebooks/other`.
# - Five times the iterations: `"SOLVER.MAX_ITER", 500, "TUNING.WARMUP_ITERS", 250`. Which classes
#   appear?
# - With CamVid under `DETECTRON2_DATASETS`, take `camvid.yaml` for real photographs; the pictures
#   are then named after its data sets.
