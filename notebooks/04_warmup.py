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
# # 4. Warm-up: the frozen baseline
#
# Stage 1 of Algorithm 1: freeze the backbone and train the decoder for $T_1$ iterations. Two
# reasons. The gradients of a random decoder would say nothing about the backbone, and the Fisher
# information is made of gradients. And a frozen foundation model is itself a strong baseline,
# which every way of tuning has to beat.
#
# This run leaves a checkpoint at $T_1$, from which [05_fisher](05_fisher.ipynb) and
# [06_fine_tuning](06_fine_tuning.ipynb) go on, and then trains on, frozen, to the end: the row
# "freeze".

# %%
import json
import os
import time
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "../datasets")

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown
from tabulate import tabulate

from fishertune_d2.config import read_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.output_dir import remove_run
from fishertune_d2.evaluation import format_table

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # the project's tests set it
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

output = OUTPUT / "freeze"
output.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## What a frozen backbone saves
#
# With $\theta$ the backbone's weights and $\phi$ the decoder's, the warm-up solves $\min_\phi
# \mathbb{E}_{(x, y)} \, L(f_{\theta, \phi}(x), y)$ with $\theta$ fixed. No parameter of the
# backbone requires a gradient, so no graph of it is kept and no backward pass through it is paid.
# One step each of the two stages, with the method that tunes everything:

# %%
cfg = read_config(CONFIG, ["TUNING.METHOD", "full", "OUTPUT_DIR", str(output)])
trainer = Trainer(cfg)
batch = next(iter(trainer.data_loader))
rows = []
for stage in ("warmup", "tuning"):
    trainer.start_stage(stage)
    optimizer = sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        sum(trainer.model(batch).values()).backward()
        seconds.append(time.process_time() - start)
    rows.append([stage, f"{optimizer / 1e6:.2f} M", f"{min(seconds):.2f}"])
headers = ["stage", "parameters in the optimizer", "processor seconds of a step"]
Markdown(tabulate(rows, headers, tablefmt="github", disable_numparse=True))

# %% [markdown]
# ## Training
#
# `TUNING.METHOD freeze` tunes nothing of the backbone after the warm-up either.

# %%
cfg = read_config(CONFIG, ["TUNING.METHOD", "freeze", "OUTPUT_DIR", str(output)])
remove_run(output)  # what an earlier execution left
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
before = {name: p.detach().clone() for name, p in trainer.segmentor.named_parameters()}
trainer.train()
print("written:", ", ".join(sorted(path.name for path in output.glob("*.pth"))))

# %% [markdown]
# The loss of each iteration, and its mean over ten. Mask2Former's loss is a sum over
# classification, masks and Dice, of every layer, so its size says little. What to see: it falls
# fast at first, and still falls, slowly, when this short run ends.

# %%
losses = np.array([value for value, _ in trainer.storage.history("total_loss").values()])
window = min(10, len(losses))
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(losses, color="lightgrey", label="one batch")
smooth = np.convolve(losses, np.ones(window) / window, "valid")
axes.plot(np.arange(window - 1, len(losses)), smooth, label=f"mean of {window}")
axes.axvline(cfg.TUNING.WARMUP_ITERS, color="black", linestyle=":", label="end of warm-up, T1")
axes.set_xlabel("iteration")
axes.set_ylabel("training loss")
axes.legend()
plt.show()

# %% [markdown]
# Frozen means frozen: every weight of the backbone is what it was, to the bit.

# %%
rows = {"backbone": [0, 0], "sem_seg_head": [0, 0]}
for name, parameter in trainer.segmentor.named_parameters():
    rows[name.split(".")[0]][0] += int((parameter != before[name]).sum())
    rows[name.split(".")[0]][1] += parameter.numel()
for part, (moved, total) in rows.items():
    print(f"{part:13} {moved:10,} of {total:10,} weights have changed")

# %% [markdown]
# ## The baseline
#
# Mean IoU over the classes that occur, in percent. What to see: how much is lost from day to the
# domains that were never seen, on the same streets.

# %%
results = json.loads((output / "results.json").read_text())
Markdown(f"```\n{format_table(results)}\n```")

# %% [markdown]
# By class, for the classes that the run has learnt at all (IoU above 5 % by day). What to see:
# the loss is not the same for all. The sky, which is bright by day, is not found at night at all;
# the road nearly as well as by day.

# %%
iou = results["per_class"]
learnt = [c for c, value in iou["streets_day_val"].items() if value > 5] or [
    *iou["streets_day_val"]
]
figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
for k, (name, values) in enumerate(iou.items()):
    places = np.arange(len(learnt)) + 0.27 * (k - 1)
    axes.bar(places, [values.get(c, 0) for c in learnt], 0.27, label=name.split("_")[1])
axes.set_xticks(range(len(learnt)), learnt, rotation=30)
axes.set_xlabel("class")
axes.set_ylabel("IoU in %")
axes.legend()
plt.show()

# %% [markdown]
# Image, label and prediction of a scene at night. What to see: road and cars are found, with
# ragged borders; above them houses, trees and sky are guesses.

# %%
Image(filename=output / "pictures/streets_night_val_1.png", width=840)

# %% [markdown]
# ## On real photographs
#
# The same on CamVid by day, scored by day and at dusk, where its files are. (Its licence is for
# research, so this notebook keeps numbers of it and no pictures.)

# %%
if QUICK or not Path(os.environ["DETECTRON2_DATASETS"], "CamVid").is_dir():
    print("CamVid is not under DETECTRON2_DATASETS: nothing to train on")
else:
    folder = OUTPUT / "camvid_freeze"
    folder.mkdir(parents=True, exist_ok=True)
    real = read_config("camvid.yaml", ["TUNING.METHOD", "freeze", "OUTPUT_DIR", str(folder)])
    remove_run(folder)
    trainer = Trainer(real)
    trainer.resume_or_load(resume=False)
    trainer.train()
    print(format_table(json.loads((folder / "results.json").read_text())))

# %% [markdown]
# After so few iterations dusk need not score below day: what counts are the large classes, and
# the two sequences hold different shares of them. A longer run tells them apart:
# [docs/results/camvid.md](../docs/results/camvid.md).
#
# ## Something to try
#
# - How long does the frozen model go on improving? `"SOLVER.MAX_ITER", 600`.
# - `"MODEL.VFM.WEIGHTS", "random"`: what is the same decoder worth on features that have seen
#   nothing?
# - What would the steps of the first table cost with a larger model? Without running it: `python
#   -m fishertune_d2.plan --config-file streets.yaml MODEL.VFM.NAME dinov2_vitl`.
