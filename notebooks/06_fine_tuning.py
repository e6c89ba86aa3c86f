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
# # 6. Fine-tuning the selected weights
#
# ![The three stages: warm-up, estimation, tuning](../docs/images/method.svg)
#
# **Summary**
#
# - Stage T3 trains the decoder and the weights with the highest DRF.
# - The trained share grows from 1 % to 5 % of the backbone during the stage.
# - Three runs continue from one warm-up: `freeze`, `full` and `fishertune`.
# - They see the same images in the same order, and differ only in the weights that the optimizer
#   holds.
# - You see how the share grows, and where the trained weights are.
# - You see to which parts of a street the ten neurons with the highest DRF respond.
# - You check that all other weights keep their value to the bit.
# - You compare the features of the three models over six domains (t-SNE).
# - These runs are too short to rank methods: they have forty iterations of tuning.
# - So the notebook ends with the scores of longer runs on CamVid, which the repository contains.
#
# The next cell holds the imports.

# %% jupyter={"source_hidden": true}
import os
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "../datasets")

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown
from tabulate import tabulate

from fishertune_d2.analysis.embedding import draw_embeddings, mean_features
from fishertune_d2.analysis.features import patch_features, read_images
from fishertune_d2.analysis.methods import draw, read_methods, scores_by_set, table
from fishertune_d2.analysis.neuron_map import draw_neurons, most_sensitive, neuron_activations
from fishertune_d2.analysis.selection_map import draw_run
from fishertune_d2.config import read_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.output_dir import remove_run
from fishertune_d2.fisher import Selection, tuned_share
from fishertune_d2.run import Run

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # set by the project's tests
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

# %% [markdown]
# ## The schedule
#
# Eq. 16 is a threshold on DRF that falls with progress $t / T$, so that the tuned set grows:
#
# $$\mathrm{thresh}(t) = d_\min + (d_\max - d_\min) \, e^{-t / T}. \tag{16}$$
#
# The text around it names $d_\min$ and $d_\max$ as shares of the weights. The formula does not
# reach these shares at the end, because $e^{-1}$ remains. The default schedule follows the text: it
# ranks all candidates once, and trains the best
#
# $$d_\min + (d_\max - d_\min) \, \frac{1 - e^{-t / T}}{1 - e^{-1}}$$
#
# of the backbone's weights. This share starts at $d_\min$ and ends at $d_\max$ exactly, and a
# selected weight stays selected. The option `eq16` is the literal threshold, with quantiles for
# $d$; $d_\min = 0.95$ and $d_\max = 0.99$ then train 1 % at the start and 3.5 % at the end. The
# default grows fast at first.

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
# ## Three methods from one warm-up
#
# All runs continue from the checkpoint of [04_warmup](04_warmup.ipynb). If the checkpoint is
# missing, this cell trains the warm-up. Each method has its own learning rate for the backbone,
# because a sparse selection needs a higher learning rate. `configs/camvid` has the same ratios,
# chosen on validation data.

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
        remove_run(OUTPUT / name)  # delete the files of an earlier execution
    cfg = read_config(CONFIG, options)
    trainers[name] = Trainer(cfg)
    trainers[name].resume_or_load(resume=done)  # 04_warmup's run, if it is there
    if not done:
        trainers[name].train()
    models[name] = trainers[name].segmentor.eval()

# %% [markdown]
# ## The weights that move
#
# The figure compares the share that the run logged in each iteration with the schedule. Each
# iteration trains the schedule's share, and the last one trains 5 %.

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
# The map shows where the trained weights are: in values and feed-forward layers of the first half.
# The dark groups hardly train.

# %%
Image(filename=draw_run(OUTPUT / "fishertune"), width=760)

# %% [markdown]
# ## What the most sensitive neurons respond to
#
# DRF also ranks whole neurons (see [05_fisher](05_fisher.ipynb)). The figure shows the ten of
# 32,256 neurons with the highest DRF. The colour of a patch is the neuron's activation, and the
# images of a row share one scale. The backbone is that of `freeze`, from which DRF was estimated.
# In short:
#
# - Seven neurons are in block 0, and four of these follow the light. The activation of 507, 1515
#   and 264 grows at dusk, and that of 636 falls.
# - Neurons 487 and 136 show the place of a dark patch: at dusk, 487 responds at the top of the
#   image, and 136 at its sides.
# - The value channels 285 and 286 of block 3 respond to road markings, by day and at dusk.
#
# This estimate is from few images, and its DRF is nearly F alone. So these are first of all the
# neurons on which the loss depends most.

# %%
neurons = most_sensitive(Run(OUTPUT / "fishertune").load_estimate(), count=10)
whole = read_config(CONFIG, ["TEST.SIZES", "[]"])  # whole images have more patches
street = {
    domain: read_images(whole, f"streets_{domain}_val", 2 if QUICK else 6)[1]
    for domain in ("day", "dusk")
}
draw_neurons(models["freeze"], neurons, street, OUTPUT / "neurons.png")
Image(filename=OUTPUT / "neurons.png")

# %% [markdown]
# The table has the mean activation over all patches of an image, and the correlation of both maps.
# The streets are the same to the pixel. So a neuron that ignores the light would have a correlation
# of 1, but half of these neurons are below 0.4.

# %%
day, dusk = neuron_activations(models["freeze"], neurons, list(street.values()))
rows = []
for neuron, *maps in zip(neurons, day.flatten(1), dusk.flatten(1), strict=True):
    means = [values.mean().item() for values in maps]
    alike = torch.corrcoef(torch.stack(maps))[0, 1].item()
    rows.append([neuron.block, neuron.kind, neuron.index, *means, alike])
headers = ["block", "kind", "neuron", "mean by day", "mean at dusk", "correlation of day and dusk"]
Markdown(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))

# %% [markdown]
# ## The other weights keep their value to the bit
#
# Masking the gradient is not enough: AdamW's weight decay and old momentum would still move the
# masked weights. Here the optimizer holds only the selected weights, so all others keep their value
# to the bit. This cell compares the final checkpoint with that of the warm-up:

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
# Therefore the difference to the public weights is small: `python -m fishertune_d2.export delta`
# writes only these weights.
#
# ## The features over domains
#
# Each point is an image: the mean over all patches of its last block's features, embedded by t-SNE
# (as in the paper's Fig. 7). t-SNE keeps neighbours together; its axes and the distances between
# groups mean nothing. So each title also gives a number without t-SNE: it counts the images whose
# most similar other image is of the same domain. The lower this number is, the better the domains
# mix.

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
# The images of night are apart in all three models. Full fine-tuning mixes the domains most, and
# FisherTune a little. After forty iterations, the figure shows no more than that.
#
# ## The scores of longer runs on CamVid
#
# Forty iterations are too few to rank methods: even another number of threads changes such scores
# by more than the methods differ. The repository contains the scores of longer runs, which anyone
# can repeat with `python -m fishertune_d2.bench`
# ([docs/results/selection.md](../docs/results/selection.md)). They trained on CamVid by day for 300
# iterations of warm-up and 300 of tuning, with three seeds (`full`: one). The test set is CamVid at
# dusk. No setting was chosen on this set. All methods but `full` and `freeze` train 5 % of the
# backbone; they differ in the choice of the weights:

# %%
SCORES = "../docs/results/selection.jsonl"
names = ["freeze", "delta_fisher", "random", "fisher", "fishertune", "full"]
methods = read_methods(SCORES, names, test=True)
Markdown(table(methods))

# %%
draw(scores_by_set(methods), OUTPUT / "camvid.png")
Image(filename=OUTPUT / "camvid.png", width=760)

# %% [markdown]
# The figure shows a point for each seed and a bar at the mean. FisherTune is far above the frozen
# backbone and above a selection by dF alone. It is also above a random selection and a selection by
# F alone, but these differences are not significant with three seeds: the intervals in the last
# column contain 0. Full fine-tuning, with one seed, is above FisherTune at this size. The paper
# reports that FisherTune beats full fine-tuning after far longer training on larger models.
# [docs/results/tables.md](../docs/results/tables.md) compares more methods.

# %% [markdown]
# ## Something to try
#
# - `"TUNING.METHOD", "random"` trains the same number of weights, chosen at random. This control
#   costs nothing.
# - Train few parameters in other ways: `"TUNING.METHOD", "lora"` (needs peft), `"vpt"` or `"rein"`.
# - Compare the three runs of this notebook: `python -m fishertune_d2.analysis.compare
#   outputs/notebooks/freeze outputs/notebooks/full outputs/notebooks/fishertune`. Repeat them with
#   `"SEED", 43`: is the order of the methods the same?
# - With CamVid under `DETECTRON2_DATASETS`, continue from the warm-up that 04_warmup trained on it:
#   `read_config("camvid.yaml", ...)` with `"TUNING.WARMUP_CHECKPOINT"`.
