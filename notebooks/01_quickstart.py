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
# ![The three stages: warm-up, estimation, tuning](../docs/images/method.svg)
#
# **Summary**
#
# - A model that segments streets by day fails at night. FisherTune (CVPR 2025) makes it more
#   robust.
# - It starts from a vision foundation model, here DINOv2 ViT-S/14, and trains 5 % of its weights:
#   those that matter for the task and react to a simulated change of domain.
# - Stage T1 trains the decoder on the frozen backbone.
# - Stage T2 measures the Fisher information of each weight. No weight changes.
# - Stage T3 trains the decoder and the selected weights.
# - This notebook trains on street scenes by day and scores the model by day, at night and in snow.
# - It needs the set-up of the README. It needs no GPU and no data: it draws the scenes itself.
# - The first run downloads 90 MB of weights and draws the scenes. Each of the two takes a minute or
#   two.
# - You get a table of scores, pictures, and a map of the selected weights.
#
# The next cell holds the imports.

# %% jupyter={"source_hidden": true}
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
# An experiment is one file, as in Detectron2. [streets.yaml](streets.yaml) is the demo's config
# with smaller images and fewer iterations. (`quick.yaml` holds a toy model for the project's
# tests.)

# %%
QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # set by the project's tests
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
# 1. **Warm-up**: the backbone is frozen, and the decoder trains for $T_1$ iterations.
# 2. **Estimation**: $T_2$ batches measure the *domain-related Fisher information* (DRF) of every
#    candidate weight. No weight changes.
# 3. **Tuning**: the decoder and the weights with the highest DRF train for $T_3$ iterations. Their
#    share grows from $d_\min$ to $d_\max$.

# %%
t1, total = cfg.TUNING.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
print(f"T1 = {t1} iterations, T2 = {cfg.FISHER.BATCHES} batches, T3 = {total - t1} iterations")
print(f"d_min = {cfg.TUNING.D_MIN:.0%}, d_max = {cfg.TUNING.D_MAX:.0%} of the backbone")

# %% [markdown]
# The trainer is Detectron2's `DefaultTrainer` with these stages as hooks. Its log says how many
# weights the optimizer holds in each stage, and where the tuned weights are at the end.

# %%
log = logging.getLogger("fishertune_d2.engine")
log.addHandler(logging.StreamHandler(sys.stdout))
log.setLevel(logging.INFO)

remove_run(output)  # delete the files of an earlier execution
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()

# %% [markdown]
# ## The table
#
# Test sets of the training domain are the *source*; the other test sets are *unseen*. The score to
# compare is the average over the unseen sets. The log above ends with the table by data set and
# class, and `results.json` holds the table and the protocol:

# %%
results = json.loads((output / "results.json").read_text())
for name, score in {**results["source"], **results["targets"]}.items():
    print(f"{name:20} mIoU {score:5.2f} %")
print(f"{'average over unseen':20} mIoU {results['target_average']:5.2f} %")

# %% [markdown]
# These scores come from a minute of training: the model has learnt the classes that fill the image,
# but not the small classes. Do not rank methods by such a run;
# [docs/results/camvid.md](../docs/results/camvid.md) has longer ones.
#
# ## The pictures
#
# Each picture shows image, label and prediction, from left to right, in Cityscapes' colours. By day
# the model finds the large regions. In snow it loses parts of these regions. At night it loses far
# more, most of all the sky.

# %%
Image(filename=output / "pictures/streets_day_val_1.png", width=840)

# %%
Image(filename=output / "pictures/streets_night_val_1.png", width=840)

# %%
Image(filename=output / "pictures/streets_snow_val_1.png", width=840)

# %% [markdown]
# ## What was tuned
#
# The map shows the selected share of each group: the query, key, value or feed-forward weights of a
# block. The selection is far from even: nearly all selected weights are values and feed-forward
# layers in the first half of the blocks. (After so short a warm-up the selection is close to that
# of F alone, as the log above says; [05_fisher](05_fisher.ipynb) explains this.)

# %%
Image(filename=draw_run(output), width=760)

# %% [markdown]
# ## Something to try
#
# - Put `"TUNING.METHOD", "full"` or `"freeze"` into the options of `read_config`, with another
#   `OUTPUT_DIR`, and compare: `python -m fishertune_d2.analysis.compare
#   ../outputs/notebooks/quickstart ../outputs/notebooks/other`.
# - Train for five times as long: `"SOLVER.MAX_ITER", 500, "TUNING.WARMUP_ITERS", 250`. Which
#   classes does the model learn then?
# - With CamVid under `DETECTRON2_DATASETS`, use `camvid.yaml` for real photographs. The pictures
#   then have the names of its data sets.
