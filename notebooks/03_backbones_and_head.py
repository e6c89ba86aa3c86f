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
# The model is a plain vision transformer (ViT), pretrained on many images by its authors, with a
# Mask2Former decoder on top. This notebook builds the model, looks at the backbone's features, and
# splits the decoder's prediction into its queries. The next cell holds the imports.

# %% jupyter={"source_hidden": true}
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
from fishertune_d2.evaluation.label_pictures import colorize
from fishertune_d2.fisher import find_candidates
from fishertune_d2.modeling import VFMS
from fishertune_d2.modeling.mask2former import semantic_scores

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # set by the project's tests
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

cfg = read_config(CONFIG, ["TUNING.METHOD", "freeze", "OUTPUT_DIR", str(OUTPUT / "freeze")])

# %% [markdown]
# ## One table of foundation models
#
# `MODEL.VFM.NAME` names an entry of this table. To add a model, add an entry. The weights are
# downloaded when a model is built. `MODEL.VFM.WEIGHTS` may name a file instead, in the format of
# its authors.

# %%
rows = [[name, row.timm_name, row.patch_size, row.licence] for name, row in VFMS.items()]
Markdown(tabulate(rows, ["name", "timm's name", "patch", "licence of weights"], "github"))

# %% [markdown]
# ## A Detectron2 backbone
#
# A ViT keeps one resolution: an image becomes $h \times w$ tokens of $D$ channels, one for each
# patch. A decoder needs a pyramid. The outputs of four blocks, at one third, one half, two thirds
# and the end of the depth, are resampled to strides 4, 8, 16 and 32. This adds no parameters.

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
# The candidates for tuning are the query, key and value projections and the two layers of the
# feed-forward network of each block (Eq. 3). A fused matrix of query, key and value counts as three
# slices of its rows.

# %%
candidates = find_candidates(backbone)
sizes = {}
for candidate in candidates:
    sizes[candidate.kind] = sizes.get(candidate.kind, 0) + candidate.numel
rows = [[kind, f"{size:,}", f"{size / counts[0] / 1e4:.1f}"] for kind, size in sizes.items()]
Markdown(tabulate(rows, ["kind", "candidate weights", "% of the backbone"], "github"))

# %% [markdown]
# ## The features
#
# These pictures show the first three principal components of the patch features as red, green and
# blue, for one street by day, at night and in snow. A colour means the same in three pictures side
# by side. The road, the cars and the houses have colours of their own although the backbone has
# seen no label. Snow keeps most of the colours of the day; night changes them in every block,
# including the last.

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
# Three components can mislead, so the next figure uses all channels. The streets of the domains are
# the same to the pixel: a backbone that ignores light and weather would give a patch the same
# feature in each domain. The figure shows the cosine of the two features, after subtracting the
# mean over all patches, averaged over patches:

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
# In snow a patch keeps a good part of its feature. At night a patch keeps far less of its feature,
# and it keeps most in the middle of the depth. Fine-tuning has to repair the rest.
#
# ## Mask2Former's queries
#
# The decoder does not classify pixels. Each of its $Q$ queries predicts a distribution over
# classes, $p_q(c)$, with "no object" as an extra class, and a mask, $m_q$. The score of class $c$
# at a pixel is a sum over queries:
#
# $$s_c(i, j) = \sum_{q=1}^{Q} p_q(c) \, \sigma\left(m_q(i, j)\right).$$
#
# An untrained decoder shows nothing, so the next cell loads the warm-up of
# [04_warmup](04_warmup.ipynb), or trains it (a minute or two) if it is missing.

# %%
warmup = Path(cfg.OUTPUT_DIR, "model_warmup.pth")
if not warmup.is_file():
    warmup.parent.mkdir(parents=True, exist_ok=True)
    remove_run(warmup.parent)  # delete the files of an earlier execution
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
WholeCheckpointer(model, cfg.OUTPUT_DIR).load(str(warmup), checkpointables=[])
with torch.no_grad():
    pixels = (images["day"]["image"] - model.pixel_mean) / model.pixel_std
    predictions = head.predict(backbone(pixels[None]))
print(f"{len(predictions)} predictions: one on the queries alone, then one after each layer")

# %% [markdown]
# The figure shows the six queries that are most certain of a class, with their masks in the last
# prediction. The queries of sky and road draw their region. The queries of pole and traffic sign
# are certain of their class, because most images contain a pole or a traffic sign. But they have
# not learnt to find these objects: their masks are almost empty.

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
# The next figure shows the class with the highest score after each prediction. A mask is the
# product of a query with the pixel decoder's features, so the queries find regions even before the
# first layer. In the layers, the queries attend to the image. After such a short training, the
# large regions are there from the start. The layers add small regions, some of which are wrong.

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
# Day and dusk in CamVid show different streets, so patches cannot be compared one by one, but the
# mean features of images can. The next cell shows how similar two images of the same light, and two
# images of different light, are relative to the mean over all images. A cosine below 0 between day
# and dusk means that the two groups lie on opposite sides of this mean. (CamVid's licence covers
# research, so this notebook keeps only numbers and no pictures.)

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
# - Use another backbone: `["MODEL.VFM.NAME", "dinov2_vits_reg"]` in `read_config`. Its registers
#   hold the information that DINOv2 otherwise writes into a few background patches. Do the pictures
#   get smoother?
# - Set `MODEL.VFM.WEIGHTS random`. How do the principal components of a model without pretraining
#   look?
# - Which queries predict "person" in other images, and are they always the same?
