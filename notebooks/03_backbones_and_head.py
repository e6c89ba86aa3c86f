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
# # 3. Backbones and head
#
# The model is a plain vision transformer (ViT), pretrained by others on a great many images, and
# a Mask2Former decoder on top. This notebook builds it, looks at the backbone's features, and
# takes the decoder's answer apart into its queries.

# %%
import os
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "../datasets")

import matplotlib.pyplot as plt
import torch
from detectron2.data import MetadataCatalog
from IPython.display import Markdown
from tabulate import tabulate

from fishertune_d2.analysis.features import patch_features, pca_pictures, read_images
from fishertune_d2.config import read_config
from fishertune_d2.engine import Trainer, WholeCheckpointer
from fishertune_d2.engine.output_dir import remove_run
from fishertune_d2.evaluation.pictures import colorize
from fishertune_d2.fisher import find_candidates
from fishertune_d2.modeling import VFMS
from fishertune_d2.modeling.mask2former import semantic_scores

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # the project's tests set it
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

cfg = read_config(CONFIG, ["TUNING.METHOD", "freeze", "OUTPUT_DIR", str(OUTPUT / "freeze")])

# %% [markdown]
# ## One table of foundation models
#
# `MODEL.VFM.NAME` is a row of it, and a further model is a further row. The weights are fetched
# when a model is built; `MODEL.VFM.WEIGHTS` may name a file, as its authors publish it.

# %%
rows = [[name, row.timm_name, row.patch_size, row.licence] for name, row in VFMS.items()]
Markdown(tabulate(rows, ["name", "timm's name", "patch", "licence of weights"], "github"))

# %% [markdown]
# ## A backbone as Detectron2 knows it
#
# A ViT keeps one resolution: an image becomes $h \times w$ tokens of $D$ channels, one for each
# patch. A decoder wants a pyramid. Four blocks' outputs, at a third, a half, two thirds and the
# end of the depth, are resampled to strides 4, 8, 16 and 32: no parameter is added.

# %%
model = Trainer.build_model(cfg).eval()
backbone, head = model.backbone, model.sem_seg_head
images = {d: read_images(cfg, f"streets_{d}_val", 4)[1] for d in ("day", "night", "snow")}
with torch.no_grad():
    maps = backbone(images["day"]["image"][None].float())
print("image", tuple(images["day"]["image"].shape))
for name, shape in backbone.output_shape().items():
    print(f"{name}: stride {shape.stride:2}, {tuple(maps[name].shape)}")
counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (backbone, head)]
print("backbone {:.2f} M parameters, head {:.2f} M".format(*counts))

# %% [markdown]
# Of the backbone, the weights that may be tuned at all are the query, key and value projections
# and the two layers of the feed-forward network of each block (Eq. 3). A fused matrix of query,
# key and value counts as three slices of its rows.

# %%
candidates = find_candidates(backbone)
sizes = {}
for candidate in candidates:
    sizes[candidate.kind] = sizes.get(candidate.kind, 0) + candidate.numel
rows = [[kind, f"{size:,}", f"{size / counts[0] / 1e4:.1f}"] for kind, size in sizes.items()]
Markdown(tabulate(rows, ["kind", "candidate weights", "% of the backbone"], "github"))

# %% [markdown]
# ## What the features show
#
# The first three principal components of the patch features, as red, green and blue, of one
# street by day, at night and in snow. A colour means the same in the three pictures of a row.
# What to see: the road, the cars and the houses have colours of their own although no label was
# seen. Snow keeps most of the colours of the day; night changes them in every block, the last
# included.

# %%
blocks = [backbone.thirds[0], backbone.thirds[2], len(backbone.vit.blocks) - 1]
figure, axes = plt.subplots(4, 3, figsize=(9, 6.4), layout="constrained")
for panel, (domain, item) in zip(axes[0], images.items(), strict=True):
    panel.imshow(item["image"].permute(1, 2, 0))
    panel.set_title(domain, fontsize=9)
for row, block in zip(axes[1:], blocks, strict=True):
    features = patch_features(model, list(images.values()), backbone.vit.blocks[block])
    for panel, picture in zip(row, pca_pictures(features), strict=True):
        panel.imshow(picture)
    row[0].set_ylabel(f"block {block + 1}", fontsize=9)
for panel in axes.flat:
    panel.set_xticks([])
    panel.set_yticks([])
axes[0, 0].set_ylabel("image", fontsize=9)
plt.show()

# %% [markdown]
# A picture of three components can mislead, so here is a number for all channels. The streets of
# the domains are the same to the pixel, so a backbone that ignored light and weather would give a
# patch the same feature in each. The cosine of the two features (after the mean over all patches
# is taken off), averaged over patches:

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
scenes = {
    d: read_images(cfg, f"streets_{d}_val", 2 if QUICK else 6) for d in ("day", "night", "snow")
}
similar = {"night": [], "snow": []}
for block in backbone.vit.blocks:
    maps = {d: torch.stack(patch_features(model, items, block)) for d, items in scenes.items()}
    mean = torch.cat(list(maps.values())).mean(dim=(0, 1, 2))
    for domain, values in similar.items():
        cosine = torch.cosine_similarity(maps["day"] - mean, maps[domain] - mean, dim=-1)
        values.append(cosine.mean().item())
for domain, values in similar.items():
    axes.plot(range(1, len(values) + 1), values, marker="o", label=f"day and {domain}")
axes.set_ylim(0, 1)
axes.set_xlabel("block")
axes.set_ylabel("cosine of a patch's features")
axes.legend()
plt.show()

# %% [markdown]
# What to see: under snow a patch keeps a good part of its feature, at night far less, and most of
# it in the middle of the depth. What does not survive is what fine-tuning has to mend.
#
# ## Mask2Former's queries
#
# The decoder does not classify pixels. Each of its $Q$ queries predicts a distribution over
# classes, $p_q(c)$, with "no object" as an extra class, and a mask, $m_q$. The score of class $c$
# at a pixel is a sum over queries,
#
# $$s_c(i, j) = \sum_{q=1}^{Q} p_q(c) \, \sigma\left(m_q(i, j)\right).$$
#
# An untrained decoder shows nothing, so this takes the warm-up of [04_warmup](04_warmup.ipynb),
# and makes it (a minute or two) if it is not there.

# %%
warmup = Path(cfg.OUTPUT_DIR, "model_warmup.pth")
if not warmup.is_file():
    warmup.parent.mkdir(parents=True, exist_ok=True)
    remove_run(warmup.parent)  # what an earlier execution left
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
WholeCheckpointer(model, cfg.OUTPUT_DIR).load(str(warmup), checkpointables=[])
with torch.no_grad():
    pixels = (images["day"]["image"] - model.pixel_mean) / model.pixel_std
    predictions = head.predict(backbone(pixels[None]))
print(f"{len(predictions)} predictions: one on the queries alone, then one after each layer")

# %% [markdown]
# The six queries that are surest of a class, with their masks in the last prediction. What to
# see: the queries of sky and road draw their region. Those of pole and traffic sign are sure of
# their class, for most images have some, and have not learnt to find it: their masks are almost
# empty.

# %%
classes = MetadataCatalog.get("streets_day_val").label_space.classes
logits, masks = predictions[-1]
best, which = logits[0].softmax(-1)[:, :-1].max(dim=-1)
figure, axes = plt.subplots(2, 3, figsize=(9, 3.6), layout="constrained")
for panel, query in zip(axes.flat, best.topk(6).indices.tolist(), strict=True):
    shown = panel.imshow(masks[0, query].sigmoid(), vmin=0, vmax=1, cmap="viridis")
    panel.set_title(f"query {query}: {classes[which[query]]}, p = {best[query]:.2f}", fontsize=8)
    panel.axis("off")
figure.colorbar(shown, ax=axes, label="σ(mask logit)")
plt.show()

# %% [markdown]
# The class of the highest score after each prediction. A mask is the product of a query with the
# pixel decoder's features, so that the queries find regions even before the first layer; the
# layers let them look at the image. What to see: after so short a training the large regions are
# there from the start, and the layers add small ones, not all of them right.

# %%
space = MetadataCatalog.get("streets_day_val").label_space
figure, axes = plt.subplots(1, 1 + len(predictions), figsize=(10, 1.6), layout="constrained")
axes[0].imshow(images["day"]["image"].permute(1, 2, 0))
axes[0].set_title("image", fontsize=9)
for k, (panel, prediction) in enumerate(zip(axes[1:], predictions, strict=True)):
    scores = semantic_scores(*prediction, size=tuple(pixels.shape[-2:]))
    panel.imshow(colorize(scores[0].argmax(0).byte().numpy(), space))
    panel.set_title("queries alone" if k == 0 else f"after layer {k}", fontsize=9)
for panel in axes:
    panel.axis("off")
plt.show()

# %% [markdown]
# ## On real photographs
#
# Day and dusk in CamVid are different streets, so patches cannot be compared one by one. The mean
# feature of an image can: how alike are two images of the same light, and of different light,
# seen from the mean of all of them? A cosine below 0 across means two groups on opposite sides.
# (CamVid's licence is for research, so this notebook keeps numbers of it and no pictures.)

# %%
if QUICK or not Path(os.environ["DETECTRON2_DATASETS"], "CamVid").is_dir():
    print("CamVid is not under DETECTRON2_DATASETS: nothing to compare")
else:
    real = read_config("camvid.yaml")
    items = read_images(real, "camvid_day_val", 12) + read_images(real, "camvid_dusk_dev", 12)
    for block in blocks:
        maps = patch_features(model, items, backbone.vit.blocks[block])
        means = torch.stack([features.mean(dim=(0, 1)) for features in maps])
        unit = torch.nn.functional.normalize(means - means.mean(dim=0), dim=1)
        cosine = unit @ unit.T
        within, across = (
            cosine[:12, :12].fill_diagonal_(torch.nan).nanmean(),
            cosine[:12, 12:].mean(),
        )
        print(f"block {block + 1:2}: day with day {within:.2f}, day with dusk {across:.2f}")

# %% [markdown]
# ## Something to try
#
# - Another backbone: `["MODEL.VFM.NAME", "dinov2_vits_reg"]` in `read_config`. Its registers take
#   what DINOv2 otherwise writes into a few background patches; do the pictures get smoother?
# - `MODEL.VFM.WEIGHTS random`: what do the principal components of a model show that has seen
#   nothing?
# - Which queries answer for "person" in other images, and are they always the same?
