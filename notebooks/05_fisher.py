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
# # 5. The Fisher information, and how a domain shift changes it
#
# Stage 2 of Algorithm 1 changes no weight. It measures the gradients of the warmed-up model, on the
# images and on the same images under a simulated shift, and gives every candidate weight one score.
# The next cell holds the imports.

# %% jupyter={"source_hidden": true}
import os
import time
from itertools import islice
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "../datasets")

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown, display
from tabulate import tabulate

from fishertune_d2.analysis.forms import select_by_each, table
from fishertune_d2.analysis.neuron_map import draw_heads
from fishertune_d2.analysis.sensitivity_map import draw_sensitivity_map
from fishertune_d2.config import read_config
from fishertune_d2.data import SegmentationMapper, build_train_loader, load_datasets
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.engine.output_dir import remove_run
from fishertune_d2.fisher import (
    KINDS,
    UNITS,
    Selection,
    StatisticsPerturbation,
    Units,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
    overlap,
    relative_change,
)
from fishertune_d2.fisher.score import mean_over_candidates

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # set by the project's tests
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

output = OUTPUT / "fisher"
output.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The warmed-up model
#
# This cell loads the warm-up of [04_warmup](04_warmup.ipynb), or trains it (two minutes) if it is
# missing.

# %%
freeze = OUTPUT / "freeze"
if not (freeze / "model_warmup.pth").is_file():
    freeze.mkdir(parents=True, exist_ok=True)
    remove_run(freeze)  # delete the files of an earlier execution
    trainer = Trainer(read_config(CONFIG, ["TUNING.METHOD", "freeze", "OUTPUT_DIR", str(freeze)]))
    trainer.resume_or_load(resume=False)
    trainer.train()
warmup = ["TUNING.WARMUP_CHECKPOINT", str(freeze / "model_warmup.pth"), "OUTPUT_DIR", str(output)]
cfg = read_config(CONFIG, warmup)
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
model, backbone = trainer.segmentor, trainer.segmentor.backbone
candidates = find_candidates(backbone)
base = sum(p.numel() for p in backbone.parameters())
print(f"{sum(c.numel for c in candidates):,} candidate weights of {base:,} in the backbone")

loader = build_train_loader(
    load_datasets(cfg.DATASETS.TRAIN),
    SegmentationMapper(cfg, is_train=True),
    batch_size=cfg.FISHER.IMS_PER_BATCH,
    num_workers=0,
    seed=cfg.SEED + 1,  # another order than training sees
)
batches = list(islice(loader, 2 * cfg.FISHER.BATCHES))
batches, others = batches[: cfg.FISHER.BATCHES], batches[cfg.FISHER.BATCHES :]
print(f"{sum(map(len, batches))} crops to estimate from, and {sum(map(len, others))} others")

# %% [markdown]
# ## F
#
# F is the diagonal of the Fisher information, one number for each weight $n$ (Eq. 4, 8, 9):
#
# $$F_n = \frac{1}{N} \sum_{i=1}^{N} \mathbb{E}_{y \sim f(y \mid x_i)}
#   \left[ \left( \frac{\partial L(f(x_i), y)}{\partial \theta_n} \right)^2 \right].$$
#
# The square is taken **per image, before the mean**. With the labels of the data instead of $y \sim
# f$, F is the *empirical* Fisher information. This is the default, because Eq. 5 and 7 are written
# with labels. `estimate_fisher` takes any model, any batches and any loss that gives one number for
# each image. `perturb` is Eq. 6 (below); with it, one call measures F on $x$ and on $x'$.

# %%
loss = SegmentationLoss()
shift = StatisticsPerturbation(
    backbone.perturbation_points(), num_prefix_tokens=backbone.num_prefix_tokens
)
estimate = estimate_fisher(model, batches, loss, candidates, perturb=shift, progress=False)
print(f"mean F(x) over all candidates: {mean_over_candidates(estimate.f):.2e}")

# %% [markdown]
# The figure shows the distribution of F by kind, on a logarithmic axis. F spans several orders of
# magnitude, and most weights of a value projection have a larger F than those of a query or key.

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for kind in KINDS:
    values = torch.cat([estimate.f[c.name][c.rows].flatten() for c in candidates if c.kind == kind])
    axes.hist(
        values[values > 0].log10(), 120, range=(-10, 0), density=True, histtype="step", label=kind
    )
axes.set_xlabel("log10 of F(x)")
axes.set_ylabel("density of weights")
axes.legend()
plt.show()

# %%
flat = torch.cat([value.flatten() for value in estimate.f.values()]).sort(descending=True).values
for share in (0.01, 0.05, 0.2):
    held = flat[: int(share * base)].sum(dtype=torch.float64) / flat.sum(dtype=torch.float64)
    print(f"the best {share:4.0%} of the backbone hold {held:.0%} of all F")

# %% [markdown]
# ## Do the estimators agree?
#
# `FISHER.ESTIMATOR` names one of several ways to measure F. `diagonal` squares the gradients of
# each image from one backward pass for the batch, `diagonal_loop` from one pass for each image.
# `smoothed` moves the squares towards their rank-one fit. `closed_form`, `natural` and
# `variational` estimate the precision $\Lambda$ of a posterior over the weights (Eq. 10 to 14), for
# which at the optimum
#
# $$F = \gamma \Lambda - \gamma \tau^{-2}. \tag{14}$$
#
# `batch_mean` squares the mean gradient of the batch: a common mistake, and ChildTuning's choice.
# `diagonal` selects 5 % of the weights. The table shows the share of these weights that each
# estimator also selects. The last two lines show the noise: `diagonal` on other crops, and with
# labels drawn from the model (the true Fisher).

# %%
chosen = Selection.from_scores(estimate.f, 0.05, base)
cases = {
    name: (name, batches, "ground_truth") for name in ("diagonal_loop", "smoothed", "closed_form")
}
cases |= {
    name: (name, batches, "ground_truth") for name in ("natural", "variational", "batch_mean")
}
cases["diagonal, other crops"] = ("diagonal", others, "ground_truth")
cases["diagonal, sampled labels"] = ("diagonal", batches, "sampled")
rows = []
for name, (estimator, crops, labels) in cases.items():
    start = time.process_time()
    found = estimate_fisher(
        model, crops, loss, candidates, estimator=estimator, labels=labels, progress=False
    )
    seconds = time.process_time() - start
    common = overlap(chosen, Selection.from_scores(found.f, 0.05, base))
    rows.append([name, 100 * common, mean_over_candidates(found.f), seconds])
headers = ["estimator", "% in common with diagonal", "mean F", "processor seconds"]
Markdown(tabulate(rows, headers, tablefmt="github", floatfmt=("", ".1f", ".1e", ".0f")))

# %% [markdown]
# `diagonal_loop` and `closed_form` select the same weights as `diagonal`, as expected, and
# `smoothed` selects nearly the same. Other crops agree less, so with so few images noise matters
# more than smoothing. The mean of `batch_mean` is about a quarter, because a batch has four images:
# their gradients point in unrelated directions and cancel, while their squares do not. `natural`
# has made one step for each of six batches and is far from its optimum. `variational` starts from
# the closed form of its first ten batches, so with six it equals `closed_form`. (Sampled labels
# give another loss, so only the ranking can be compared.)
# [docs/results/fisher.md](../docs/results/fisher.md) uses many more images.
#
# ## The simulated shift
#
# Eq. 6 draws new statistics for the features (see [02_data_and_domains](02_data_and_domains.ipynb)
# for $\mu, \sigma$ and $\Sigma$):
#
# $$\alpha = \mu + \epsilon_\mu \Sigma_\mu, \qquad \beta = \sigma + \epsilon_\sigma \Sigma_\sigma,
#   \qquad x' = \beta \, \frac{x - \mu}{\sigma} + \alpha, \qquad \epsilon \sim \mathcal{N}(0, 1).
#   \tag{6}$$
#
# The loss draws the same random points for $x$ and $x'$. So with the shift switched off, F(x) and
# F(x') are equal on the CPU, to the last bit; check this before you believe a difference. On a GPU
# the last bits may differ, because some sums add in another order every time.

# %%
off = StatisticsPerturbation(shift.points, num_prefix_tokens=shift.num_prefix_tokens, strength=0.0)
same = estimate_fisher(model, batches[:1], loss, candidates, perturb=off, progress=False)
print("F(x) == F(x') at strength 0:", all(torch.equal(same.f[n], same.shifted[n]) for n in same))
print(f"mean of exp(-(|eps_mu| + |eps_sigma|)) at strength 1: {estimate.shift_weight:.2f}")

# %% [markdown]
# ## dF and DRF
#
# $\Delta F$ says how much the shift changes a weight's information, relative to its size (Eq. 5).
# DRF joins F and $\Delta F$ in one score (Eq. 7):
#
# $$\Delta F = \frac{|F(x) - F(x')|}{\min(F(x), F(x')) + \varepsilon}, \qquad
#   \mathrm{DRF} = F(x) + e^{-(\epsilon_\mu + \epsilon_\sigma)} \, \Delta F. \tag{5, 7}$$
#
# Read literally, the sum adds numbers of different scales: $F$ is small, here below $10^{-3}$ for
# most weights, and $\Delta F$ is a ratio of order one and more. So the ranking is that of $\Delta
# F$ alone. Eq. 15 states the score in terms of $\Lambda$:
#
# $$\mathrm{DRF} = \gamma \left( \Lambda_x - \tau^{-2} + e^{-(\epsilon_\mu + \epsilon_\sigma)}
#   \frac{|\Lambda_x - \Lambda_{x'}|}{\min(\Lambda_x, \Lambda_{x'}) + \varepsilon / \gamma} \right).
#   \tag{15}$$
#
# Here $\gamma$ decides: if it is far below $F$, the ranking is that of $F$ alone. The default,
# `balanced`, is Eq. 15 with $\gamma$ the mean of $F$ over all candidates and $\gamma \tau^{-2}$ one
# hundredth of it. These constants come from the estimate itself; they are ours, because the paper's
# text does not give any. The exponent uses the absolute values of both $\epsilon$, one pair for
# each image: a negative $\epsilon$ would amplify $\Delta F$. The table shows which weights each
# form of the score selects from this estimate:

# %%
Markdown(table(select_by_each(estimate, share=0.05)))

# %% [markdown]
# `eq7` selects the same weights as dF, and `eq15` with a fixed $\gamma$ the same as F. `balanced`
# lies between the two, here near F: after so short a warm-up, F is concentrated in few weights.
# After 300 iterations on CamVid, both terms contribute about equally
# ([docs/results/camvid.md](../docs/results/camvid.md)). Every run logs both overlaps, so that you
# notice a one-sided score.
#
# ## Stronger shifts
#
# The strength is a factor on both $\epsilon$ (compare the paper's Fig. 4). The stronger the shift,
# the more $\Delta F$ decides the selection, and the less F does.

# %%
strengths, common = (0.25, 1.0, 4.0), {"F(x) alone": [], "dF alone": []}
for strength in strengths:
    grown = StatisticsPerturbation(
        shift.points, num_prefix_tokens=shift.num_prefix_tokens, strength=strength
    )
    e = estimate_fisher(model, batches[:3], loss, candidates, perturb=grown, progress=False)
    change = relative_change(e.f, e.shifted, eps=1e-8)
    drf = domain_related_fisher(e)
    by = [Selection.from_scores(scores, 0.05, base) for scores in (drf, e.f, change)]
    for name, other in zip(common, by[1:], strict=True):
        common[name].append(100 * overlap(by[0], other))
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, values in common.items():
    axes.plot(strengths, values, marker="o", label=f"with {name}")
axes.set_xscale("log", base=2)
axes.set_xticks(strengths, strengths)
axes.set_ylim(0, 100)
axes.set_xlabel("strength of the simulated shift")
axes.set_ylabel("% of what DRF selects, in common")
axes.legend()
plt.show()

# %% [markdown]
# ## The sensitivity map
#
# The map shows the mean of each group, divided by the mean over all candidates, for F and for DRF
# (the paper's Fig. 6). Values and feed-forward layers of the first half are above average, queries
# and keys below it, and DRF raises the deeper half. The paper, on a ViT-L after long training,
# finds the important weights in the deeper blocks, and Q and K above V. This model is small and has
# trained for a minute; this notebook cannot tell whether that is the reason.

# %%
draw_sensitivity_map([("streets", estimate)], output / "sensitivity.png")
Image(filename=output / "sensitivity.png", width=760)

# %% [markdown]
# ## Whole neurons
#
# The paper selects single weights; `TUNING.UNIT neuron` selects whole neurons. A neuron is a
# channel of Q, K or V with its row of weights, or a hidden neuron of the feed-forward network with
# its row of the first layer and its column of the second. Its F is the mean over its weights, and
# DRF is computed from these means. In short:
#
# - Neurons come from the same parts as single weights: feed-forward layers and values of the first
#   half.
# - Yet less than half of the selected single weights are in a selected neuron.
# - The choice of neurons is less noisy.

# %%
by_unit = {}
for unit in UNITS:
    units = Units(unit, estimate.shapes)
    drf = domain_related_fisher(estimate.by_unit(units))
    by_unit[unit] = Selection.from_scores(drf, 0.05, base, units)
print(by_unit["neuron"])
common = overlap(by_unit["weight"], by_unit["neuron"])
print(f"\n{common:.0%} of the selected single weights are in a selected neuron")

# %% [markdown]
# A head is a group of channels. The figure shows the selected share of each head in Q, K and V, and
# of each feed-forward network. The heads of one block differ: in block 1, the selected share of a
# head's value channels runs from 0 to 77 %. In block 3, one head has all its value channels
# selected.

# %%
draw_heads(by_unit["neuron"], backbone.vit.blocks[0].attn.num_heads, output / "heads.png")
Image(filename=output / "heads.png", width=760)

# %% [markdown]
# The table shows how much of each selection stays the same with the other crops. Neurons stay more
# often than single weights: a mean over hundreds of weights has less noise than one of them. (A
# less noisy selection need not give a higher mIoU, which this notebook does not measure.)

# %%
again = estimate_fisher(model, others, loss, candidates, perturb=shift, progress=False)
rows = []
for unit in UNITS:
    units = Units(unit, estimate.shapes)
    halves = [e.by_unit(units) for e in (estimate, again)]
    row = [unit]
    for score in (lambda e: e.f, domain_related_fisher):
        first, second = (Selection.from_scores(score(e), 0.05, base, units) for e in halves)
        row.append(100 * overlap(first, second))
    rows.append(row)
headers = ["unit", "F: % in common with other crops", "DRF: % in common with other crops"]
Markdown(tabulate(rows, headers, tablefmt="github", floatfmt=".1f"))

# %% [markdown]
# ## On real photographs
#
# Does another source select other weights? This cell makes the same estimate on CamVid by day,
# after CamVid's warm-up, if 04_warmup has trained it. The maps of groups are similar, but less than
# half of the single weights are the same. (For comparison, the table above shows this share for
# other crops of the same source.)

# %%
real_warmup = OUTPUT / "camvid_freeze/model_warmup.pth"
if not real_warmup.is_file():
    print("04_warmup has not trained on CamVid: nothing to compare with")
else:
    real = read_config(
        "camvid.yaml",
        ["TUNING.WARMUP_CHECKPOINT", str(real_warmup), "OUTPUT_DIR", str(output)],
    )
    trainer = Trainer(real)
    trainer.resume_or_load(resume=False)
    model, backbone = trainer.segmentor, trainer.segmentor.backbone
    points = backbone.perturbation_points()
    photographs = estimate_fisher(
        model,
        islice(trainer.data_loader, real.FISHER.BATCHES),
        loss,
        find_candidates(backbone),
        perturb=StatisticsPerturbation(points, num_prefix_tokens=backbone.num_prefix_tokens),
        progress=False,
    )
    scores = [domain_related_fisher(e) for e in (estimate, photographs)]
    both = [Selection.from_scores(score, 0.05, base) for score in scores]
    print(f"{overlap(*both):.0%} of what DRF selects on streets it selects on CamVid too")
    draw_sensitivity_map([("CamVid", photographs)], output / "sensitivity_camvid.png")
    display(Image(filename=output / "sensitivity_camvid.png", width=760))

# %% [markdown]
# ## Something to try
#
# - Use twice the batches: how much more do two halves of the data agree?
# - `eps_mode="channel"` draws one $\epsilon$ for each channel, as DSU does. Does this change the
#   selection more than other crops do?
# - Perturb only the patch embedding: `StatisticsPerturbation(shift.points[:1], ...)`. In which
#   blocks does dF fall most?
