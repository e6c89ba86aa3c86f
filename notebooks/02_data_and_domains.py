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
# # 2. Data and domains
#
# Train on one *source* domain, never see the *targets*, be tested on them. This notebook looks at
# the data, measures how far the domains lie apart in the very statistics that the method's
# simulated shift (Eq. 6) redraws, and registers data of one's own.

# %%
import os
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "../datasets")

import matplotlib.pyplot as plt
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from IPython.display import Image, Markdown
from PIL import Image as Picture
from tabulate import tabulate

from fishertune_d2.analysis.domains import distance, draw_distances, statistics_of
from fishertune_d2.analysis.features import patch_features, read_images
from fishertune_d2.config import read_config
from fishertune_d2.data import DatasetError, check_datasets, register_sem_seg
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import read_image, read_label
from fishertune_d2.engine import Trainer
from fishertune_d2.evaluation.pictures import colorize
from fishertune_d2.streets.dataset import render_scene

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # the project's tests set it
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

output = OUTPUT / "domains"
output.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The data sets
#
# Importing the package registers them in Detectron2's catalogs. Nothing is read from disk until
# one is used; where files are missing, the error names the folders that are expected.
# [datasets/README.md](../datasets/README.md) has the layouts and licences.

# %%
rows = [[row.name, row.domain, row.published.pairs, row.label_map] for row in DATASETS]
Markdown(tabulate(rows, ["name", "domain", "pairs", "label map"], tablefmt="github"))

# %% [markdown]
# The domain decides what counts as unseen: a test set is a source if its domain equals, contains
# or lies within one that was trained on, as `acdc/fog` lies within `acdc`.
#
# ## The shift one can see
#
# The built-in streets have one advantage over photographs: a validation scene is the same street
# in all six domains, so the label is the same to the pixel. Only light and weather differ. What
# to see: fog and snow take contrast, night takes light and adds lamps, rain adds reflections.

# %%
domains = ["day", "dusk", "night", "fog", "rain", "snow"]
figure, axes = plt.subplots(2, 4, figsize=(10, 2.9), layout="constrained")
for panel, domain in zip(axes[:, :3].flat, domains, strict=True):
    item = DatasetCatalog.get(f"streets_{domain}_val")[1]
    panel.imshow(read_image(item["file_name"]))
    panel.set_title(domain, fontsize=9)
label = read_label(item["sem_seg_file_name"], item["label_map"])
space = MetadataCatalog.get("streets_day_val").label_space
axes[0, 3].imshow(colorize(label, space))
axes[0, 3].set_title("label of all six", fontsize=9)
for panel in axes.flat:
    panel.axis("off")
plt.show()

# %% [markdown]
# How much of the images each class fills decides what a short training can learn. The axis is
# logarithmic. What to see: road, vegetation, building and sky fill three quarters of it, and most
# other classes, on which mIoU depends just as much, a fiftieth or less.

# %%
pixels = np.zeros(256)
for item in DatasetCatalog.get("streets_day_train")[:: 1 if QUICK else 6]:
    pixels += np.bincount(
        read_label(item["sem_seg_file_name"], item["label_map"]).ravel(), None, 256
    )
shares = 100 * pixels[:19] / pixels[:19].sum()
figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
axes.bar(
    space.classes, shares, color=np.array(space.colors) / 255, edgecolor="black", linewidth=0.4
)
axes.set_yscale("log")
axes.set_ylabel("% of labelled pixels")
axes.set_xlabel("class, in Cityscapes' colours")
axes.tick_params(axis="x", labelrotation=60)
plt.show()

# %% [markdown]
# ## The shift one can measure
#
# FisherTune simulates an unseen domain by redrawing the statistics of features. For a map $x \in
# \mathbb{R}^{h \times w \times D}$ these are, per image and channel, mean and standard deviation
# over space,
#
# $$\mu(x) = \frac{1}{hw} \sum_{i,j} x_{ij}, \qquad
#   \sigma(x) = \sqrt{\frac{1}{hw} \sum_{i,j} (x_{ij} - \mu(x))^2},$$
#
# and $\Sigma_\mu$, $\Sigma_\sigma$ are their standard deviations over the images of the source:
# how uncertain each statistic is. Eq. 6 moves an image by $\epsilon_\mu \Sigma_\mu$ and
# $\epsilon_\sigma \Sigma_\sigma$ with $\epsilon \sim \mathcal{N}(0, 1)$. So the natural distance
# of a real domain from the source is
#
# $$d_\mu = \frac{|\bar\mu_{\text{target}} - \bar\mu_{\text{source}}|}{\Sigma_\mu}
#   \quad \text{(and likewise } d_\sigma \text{)},$$
#
# the $|\epsilon|$ that would carry the average image over. First for the three colours:

# %%
cfg = read_config(CONFIG)
count = 2 if QUICK else 12
images = {domain: read_images(cfg, f"streets_{domain}_val", count) for domain in domains}
colours = {
    domain: statistics_of([item["image"].permute(1, 2, 0).float() for item in items])
    for domain, items in images.items()
}
rows = [[domain, *distance(colours["day"], colours[domain]).ravel()] for domain in domains[1:]]
headers = ["domain", *(f"{statistic} {c}" for statistic in "μσ" for c in ("red", "green", "blue"))]
Markdown(tabulate(rows, headers, tablefmt="github", floatfmt=".1f"))

# %% [markdown]
# Then for the features of the foundation model, at the four places where Eq. 6 is applied by
# default: the patch embedding and the blocks at a third, a half and two thirds of the depth. The
# mean over channels of $d_\mu$ and $d_\sigma$:

# %%
model = Trainer.build_model(cfg).eval()
points = model.backbone.perturbation_points()
places = ["patch embedding", *(f"block {i + 1}" for i in model.backbone.thirds)]
measured = {
    domain: {"pixels": distance(colours["day"], colours[domain]).mean()} for domain in domains[1:]
}
for place, module in zip(places, points, strict=True):
    stats = {d: statistics_of(patch_features(model, items, module)) for d, items in images.items()}
    for domain in domains[1:]:
        measured[domain][place] = distance(stats["day"], stats[domain]).mean()
draw_distances(measured, output / "distances.png", source="day")
Image(filename=output / "distances.png")

# %% [markdown]
# What to see: in the pixels, dusk and night are about four $\Sigma$ away, far more than Eq. 6
# draws at strength 1 (dotted: the mean of $|\epsilon|$). In the blocks they come nearer: the
# foundation model already removes a good part of the shift, and what is left two thirds of the
# way, one to one and a half $\Sigma$, is of the size of the simulated one. It is a crude measure,
# for it looks at each channel alone and at a dozen images.
#
# ## On real photographs
#
# The same for CamVid, by day and at dusk, where its files are. (Its licence is for research, so
# this notebook keeps numbers of it and no pictures.)

# %%
if QUICK or not Path(os.environ["DETECTRON2_DATASETS"], "CamVid").is_dir():
    print("CamVid is not under DETECTRON2_DATASETS: nothing to compare with")
else:
    real = read_config("camvid.yaml")
    names = {"day": "camvid_day_val", "dusk": "camvid_dusk_dev"}
    images = {domain: read_images(real, name, count) for domain, name in names.items()}
    for place, module in zip(places, points, strict=True):
        day, dusk = (
            statistics_of(patch_features(model, items, module)) for items in images.values()
        )
        print(f"{place:16} dusk is {distance(day, dusk).mean():.2f} Σ away from day")

# %% [markdown]
# ## Your own data, in one call
#
# A folder of images and one of labels become a data set by `register_sem_seg`. Here is one of
# four scenes and three classes:

# %%
own, classes = output / "own", ["ground", "things", "sky"]
to_three = np.full(256, 255, np.uint8)
to_three[:19] = [0, 0] + [1] * 8 + [2] + [1] * 8
for seed in range(4):
    for folder, content in zip(("images", "labels"), render_scene(seed), strict=True):
        (own / folder).mkdir(parents=True, exist_ok=True)
        content = to_three[content] if folder == "labels" else content
        Picture.fromarray(content).save(own / folder / f"{seed}.png")

register_sem_seg("own_city", own / "images", own / "labels", classes)
check_datasets(["own_city"], num_classes=3)
print(DatasetCatalog.get("own_city")[0])

# %% [markdown]
# Before training starts, every file is read once. A label that does not fit is named, with the
# remedy, before a GPU is waited for:

# %%
Picture.fromarray(np.full((256, 512), 7, np.uint8)).save(own / "labels/3.png")
try:
    check_datasets(["own_city"], num_classes=3)
except DatasetError as error:
    print(error)

# %% [markdown]
# ## Something to try
#
# - Register two folders of your own photographs, one by day and one at night, and put them into
#   the table of distances (labels of zeros will do for that).
# - Which domain is nearest if only $d_\mu$, or only $d_\sigma$, is taken? (`distance` returns
#   both.)
# - `python -m fishertune_d2.data.check --all` says of every data set on this machine whether it
#   is complete.
