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
# Stage 1 of Algorithm 1 freezes the backbone and trains the decoder for $T_1$ iterations. There are
# two reasons. The Fisher information consists of gradients, and the gradients of a random decoder
# would say nothing about the backbone. Also, a frozen foundation model is a strong baseline, which
# every way of tuning has to beat.
#
# This run writes a checkpoint at $T_1$, from which [05_fisher](05_fisher.ipynb) and
# [06_fine_tuning](06_fine_tuning.ipynb) continue. Then it trains to the end with a frozen backbone:
# the method `freeze`. The next cell holds the imports.

# %% jupyter={"source_hidden": true}
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

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # set by the project's tests
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

output = OUTPUT / "freeze"
output.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The savings of a frozen backbone
#
# Let $\theta$ be the backbone's weights and $\phi$ the decoder's. The warm-up solves $\min_\phi
# \mathbb{E}_{(x, y)} \, L(f_{\theta, \phi}(x), y)$ with $\theta$ fixed. No parameter of the
# backbone requires a gradient, so training keeps no graph of it and makes no backward pass through
# it. The table compares one step of the warm-up with one step of full fine-tuning:

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
# With `TUNING.METHOD freeze` the backbone stays frozen after the warm-up too.

# %%
cfg = read_config(CONFIG, ["TUNING.METHOD", "freeze", "OUTPUT_DIR", str(output)])
remove_run(output)  # delete the files of an earlier execution
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
before = {name: p.detach().clone() for name, p in trainer.segmentor.named_parameters()}
trainer.train()
print("written:", ", ".join(sorted(path.name for path in output.glob("*.pth"))))

# %% [markdown]
# The figure shows the loss of each iteration, and its mean over ten. Mask2Former's loss is a sum
# over classification, masks and Dice of every layer, so its absolute size means little. It falls
# fast at first, and still falls slowly when this short run ends.

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
# Every weight of the frozen backbone keeps its value to the bit:

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
# The table shows the mean IoU over the classes that occur, in percent. On the same streets, the
# score falls from day to the unseen domains.

# %%
results = json.loads((output / "results.json").read_text())
Markdown(f"```\n{format_table(results)}\n```")

# %% [markdown]
# The next figure shows the IoU by class, for the classes that the run has learnt (IoU above 5 % by
# day). The fall differs between classes. The sky, which is bright by day, is not found at night at
# all; the road is found nearly as well as by day.

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
# This picture shows image, label and prediction of a scene at night. The model finds road and cars,
# with ragged borders; above them it guesses houses, trees and sky.

# %%
Image(filename=output / "pictures/streets_night_val_1.png", width=840)

# %% [markdown]
# ## On real photographs
#
# This cell trains the same model on CamVid by day, and scores it by day and at dusk, if CamVid's
# files are there. (CamVid's licence covers research, so this notebook keeps only numbers and no
# pictures.)

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
# After so few iterations, dusk need not score below day: the large classes decide the score, and
# the two sequences contain different shares of them. A longer run separates day and dusk:
# [docs/results/camvid.md](../docs/results/camvid.md).
#
# ## Something to try
#
# - Set `"SOLVER.MAX_ITER", 600`. For how long does the frozen model improve?
# - Set `"MODEL.VFM.WEIGHTS", "random"`. How good is the same decoder on features without
#   pretraining?
# - How much would the steps of the first table cost with a larger model? This command computes the
#   cost without running the model: `python -m fishertune_d2.plan --config-file streets.yaml
#   MODEL.VFM.NAME dinov2_vitl`.
