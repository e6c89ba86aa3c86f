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
# # 6. Fine-tuning what was selected
#
# Stage 3 of Algorithm 1: the decoder and the weights of the highest DRF train, ever more of them.
# FisherTune stands beside full fine-tuning and the frozen backbone, all three from one warm-up.

# %%
import os
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "../datasets")

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown

from fishertune_d2.analysis.compare import compare
from fishertune_d2.analysis.embedding import draw_embeddings, mean_features
from fishertune_d2.analysis.features import patch_features, read_images
from fishertune_d2.analysis.selection_map import draw_run
from fishertune_d2.config import read_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.output_dir import remove_run
from fishertune_d2.fisher import Selection, tuned_share

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # the project's tests set it
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

# %% [markdown]
# ## The schedule
#
# Eq. 16 is a threshold on DRF that falls with progress $t / T$, so that the tuned set grows:
#
# $$\mathrm{thresh}(t) = d_\min + (d_\max - d_\min) \, e^{-t / T}. \tag{16}$$
#
# The text around it names $d_\min$ and $d_\max$ as shares of the weights, which the formula does
# not reach at the end ($e^{-1}$ is left). The default, `text`, does what the text says: all
# candidates are ranked once, and the best
#
# $$d_\min + (d_\max - d_\min) \, \frac{1 - e^{-t / T}}{1 - e^{-1}}$$
#
# of the backbone's weights move. It starts at $d_\min$ and ends at $d_\max$ exactly, and what is
# selected stays selected. The literal threshold is the option `eq16`, with quantiles for $d$;
# then $d_\min = 0.95$, $d_\max = 0.99$ tune from 1 % to 3.5 %. What to see: `text` grows fast at
# first.

# %%
progress = np.linspace(0, 1, 101)
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for form, bounds in {
    "growing": (0.01, 0.05),
    "eq16": (0.95, 0.99),
    "linear": (0.01, 0.05),
    "constant": (0.01, 0.05),
}.items():
    shares = [100 * tuned_share(t, *bounds, schedule=form) for t in progress]
    axes.plot(progress, shares, label=form)
axes.set_xlabel("progress t / T of the tuning stage")
axes.set_ylabel("% of the backbone that is tuned")
axes.set_ylim(bottom=0)
axes.legend(title="TUNING.SCHEDULE")
plt.show()

# %% [markdown]
# ## Three ways from one warm-up
#
# All go on from the checkpoint of [04_warmup](04_warmup.ipynb) (made now if it is not there), see
# the same images in the same order, and differ in what of the backbone the optimizer holds. The
# backbone's learning rate is each method's own: a sparse selection wants a higher one. The ratio
# is that of `configs/camvid`, where it was chosen on validation data.

# %%
freeze = OUTPUT / "freeze"
runs = {
    "freeze": ["TUNING.METHOD", "freeze"],
    "full": ["TUNING.METHOD", "full", "SOLVER.BACKBONE_MULTIPLIER", 0.3],
    "fishertune": ["TUNING.METHOD", "fishertune", "SOLVER.BACKBONE_MULTIPLIER", 3.0],
}
models, trainers = {}, {}
for name, options in runs.items():
    options = [*options, "OUTPUT_DIR", str(OUTPUT / name)]
    if name != "freeze":
        options += ["TUNING.WARMUP_CHECKPOINT", str(freeze / "model_warmup.pth")]
    (OUTPUT / name).mkdir(parents=True, exist_ok=True)
    done = name == "freeze" and (freeze / "results.json").is_file()
    if not done:
        remove_run(OUTPUT / name)  # what an earlier execution left
    cfg = read_config(CONFIG, options)
    trainers[name] = Trainer(cfg)
    trainers[name].resume_or_load(resume=done)  # 04_warmup's run, if it is there
    if not done:
        trainers[name].train()
    models[name] = trainers[name].segmentor.eval()

# %% [markdown]
# mIoU in percent, and what was tuned:

# %%
Markdown(compare([OUTPUT / name for name in runs]))

# %% [markdown]
# Read this with care: it is one seed, forty iterations of tuning and a small model, and
# differences of a point are noise: even another number of threads changes them. By day, tuning
# 5 % of the weights moves the score as far as tuning all of them. On the unseen domains forty
# iterations are too few to tell the three apart.
# [docs/results/camvid.md](../docs/results/camvid.md) has 300 iterations of tuning on photographs;
# there FisherTune is far above the frozen backbone at dusk, and below full fine-tuning. The paper
# reports that it beats full fine-tuning after far longer training on larger models.
#
# ## What moves
#
# The share that was tuned in each iteration, as the run logged it, against the schedule. What to
# see: what moves is the schedule's share in every iteration, and the last one tunes 5 %.

# %%
cfg, storage = trainers["fishertune"].cfg, trainers["fishertune"].storage
tuned = np.array(storage.history("fisher/tuned_parameters").values())
base = sum(p.numel() for p in models["freeze"].backbone.parameters())
bounds = (cfg.TUNING.D_MIN, cfg.TUNING.D_MAX)
steps = (tuned[:, 1] - cfg.TUNING.WARMUP_ITERS) / (
    cfg.SOLVER.MAX_ITER - cfg.TUNING.WARMUP_ITERS - 1
)
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(tuned[:, 1], [100 * tuned_share(t, *bounds) for t in steps], label="schedule")
axes.plot(tuned[:, 1], 100 * tuned[:, 0] / base, "o", markersize=3, label="weights tuned")
axes.set_xlabel("iteration")
axes.set_ylabel("% of the backbone")
axes.set_ylim(bottom=0)
axes.legend()
plt.show()

# %% [markdown]
# Where they lie. What to see: values and feed-forward layers of the first half; the dark groups
# are hardly touched.

# %%
Image(filename=draw_run(OUTPUT / "fishertune"), width=760)

# %% [markdown]
# ## What stays, to the bit
#
# A masked gradient is not enough: AdamW's weight decay and old momentum would go on moving what
# is no longer to be moved. Here the optimizer holds only the selected weights, so that all others
# keep their value to the bit. Compare the checkpoint at the end with that of the warm-up:

# %%
start, end = (
    torch.load(file, weights_only=True)["model"]
    for file in (freeze / "model_warmup.pth", OUTPUT / "fishertune/model_final.pth")
)
masks = Selection.load(OUTPUT / "fishertune/selection.safetensors").masks(cfg.TUNING.D_MAX)
moved, outside = 0, 0
for name in (name for name in start if name.startswith("backbone.")):
    changed = start[name] != end[name]
    mask = masks.get(name.removeprefix("backbone."), torch.zeros_like(changed))
    moved, outside = moved + int(changed.sum()), outside + int((changed & ~mask).sum())
print(f"{moved:,} of {base:,} backbone weights moved ({moved / base:.1%})")
print(f"{outside} of them were not selected")

# %% [markdown]
# That is what makes a small delta possible: `python -m fishertune_d2.export delta` writes only
# these.
#
# ## The features over domains
#
# Each point is an image: the mean of its last block's features over all patches, embedded by
# t-SNE (as the paper's Fig. 7). t-SNE keeps neighbours together; its axes and the distances
# between groups mean nothing. So each title also says, without t-SNE, for how many images the
# most similar other one is of the same domain: the lower, the better the domains mix.

# %%
domains, count = ["day", "dusk", "night", "fog", "rain", "snow"], 2 if QUICK else 10
images = {domain: read_images(cfg, f"streets_{domain}_val", count) for domain in domains}
features = {
    name: {d: mean_features(patch_features(model, items)) for d, items in images.items()}
    for name, model in models.items()
}
draw_embeddings(features, OUTPUT / "tsne.png")
Image(filename=OUTPUT / "tsne.png")

# %% [markdown]
# What to see: the images of night lie apart in all three. Full fine-tuning mixes the domains most,
# FisherTune a little; after forty iterations no more can be read from it.
#
# ## On real photographs
#
# FisherTune on CamVid, from the warm-up of 04_warmup, beside its frozen row, where 04_warmup has
# made it. Thirty iterations of tuning, one seed.

# %%
real_freeze = OUTPUT / "camvid_freeze"
if not (real_freeze / "results.json").is_file():
    print("04_warmup has not trained on CamVid: nothing to go on from")
else:
    folder = OUTPUT / "camvid_fishertune"
    folder.mkdir(parents=True, exist_ok=True)
    options = [*runs["fishertune"], "OUTPUT_DIR", str(folder)]
    options += ["TUNING.WARMUP_CHECKPOINT", str(real_freeze / "model_warmup.pth")]
    remove_run(folder)
    trainer = Trainer(read_config("camvid.yaml", options))
    trainer.resume_or_load(resume=False)
    trainer.train()
    print(compare([real_freeze, folder]))

# %% [markdown]
# ## Something to try
#
# - A control that costs nothing: `"TUNING.METHOD", "random"` tunes as many weights, drawn at
#   random.
# - `"TUNING.METHOD", "lora"` (needs peft), `"vpt"`, `"rein"`: other ways to tune little.
# - Three seeds of each (`"SEED", 43`): how large is the noise that the text above warns of?
#   `python -m fishertune_d2.bench` does this with confidence intervals.
