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
# Domain generalization trains on one *source* domain, never sees the *targets*, and is tested on
# them. This notebook looks at the data. It measures the distance between the domains, by the same
# statistics that the method's simulated shift (Eq. 6) changes. Then it registers data of your own.
# The next cell holds the imports.

# %% jupyter={"source_hidden": true}
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
from fishertune_d2.evaluation.label_pictures import colorize
from fishertune_d2.streets.dataset import render_scene

# %matplotlib inline

QUICK = bool(os.environ.get("FISHERTUNE_NOTEBOOK_QUICK"))  # set by the project's tests
CONFIG = "quick.yaml" if QUICK else "streets.yaml"
OUTPUT = Path("../outputs/notebooks", "quick" * QUICK)

output = OUTPUT / "domains"
output.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The data sets
#
# Importing the package registers the data sets in Detectron2's catalogs. Nothing is read from disk
# before a data set is used; if files are missing, the error names the folders that are expected.
# [datasets/README.md](../datasets/README.md) has the layouts and licences.

# %%
rows = [[row.name, row.domain, row.published.pairs, row.label_map] for row in DATASETS]
Markdown(tabulate(rows, ["name", "domain", "pairs", "label map"], tablefmt="github"))

# %% [markdown]
# The domain decides whether a test set is unseen: it is a source if its domain equals, contains or
# is part of a training domain. For example, `acdc/fog` is part of `acdc`.
#
# ## The visible shift
#
# The built-in streets have one advantage over photographs: a validation scene shows the same street
# in all six domains, so the label is the same to the pixel. Only light and weather differ. Fog and
# snow reduce contrast, night removes light and adds lamps, and rain adds reflections.

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
# The share of the pixels that a class fills decides whether a short training learns the class. The
# axis is logarithmic. Road, vegetation, building and sky fill three quarters of the pixels. Most
# other classes fill a fiftieth or less, although mIoU weighs them equally.

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
# ## The measurable shift
#
# FisherTune simulates an unseen domain: it draws new statistics for the features. For a map $x \in
# \mathbb{R}^{h \times w \times D}$ the statistics are the mean and the standard deviation over
# space, per image and channel:
#
# $$\mu(x) = \frac{1}{hw} \sum_{i,j} x_{ij}, \qquad
#   \sigma(x) = \sqrt{\frac{1}{hw} \sum_{i,j} (x_{ij} - \mu(x))^2}.$$
#
# $\Sigma_\mu$ and $\Sigma_\sigma$ are the standard deviations of these statistics over the images
# of the source: they say how uncertain each statistic is. Eq. 6 moves an image by $\epsilon_\mu
# \Sigma_\mu$ and $\epsilon_\sigma \Sigma_\sigma$ with $\epsilon \sim \mathcal{N}(0, 1)$. So the
# natural distance of a real domain from the source is
#
# $$d_\mu = \frac{|\bar\mu_{\text{target}} - \bar\mu_{\text{source}}|}{\Sigma_\mu}
#   \quad \text{(and likewise } d_\sigma \text{)},$$
#
# the $|\epsilon|$ that moves the average source image to the target. The first table shows this
# distance for the three colours:

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
# The next figure shows the distance for the features of the foundation model, at the four places
# where Eq. 6 is applied by default: the patch embedding, and the blocks at one third, one half and
# two thirds of the depth. Each value is the mean of $d_\mu$ and $d_\sigma$ over the channels:

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
# In the pixels, dusk and night are about four $\Sigma$ away from day. That is far more than Eq. 6
# draws at strength 1 (the dotted line shows the mean of $|\epsilon|$). In the blocks, dusk and
# night are nearer to day: the foundation model already removes a good part of the shift. At two
# thirds of the depth, a distance of one to one and a half $\Sigma$ remains, about as much as the
# simulated shift. This measure is crude: it treats each channel alone, and uses a dozen images.
#
# ## On real photographs
#
# This cell measures the same distances for CamVid, by day and at dusk, if its files are there.
# (CamVid's licence covers research, so this notebook keeps only numbers and no pictures.)

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
# `register_sem_seg` makes a data set from a folder of images and a folder of labels. This data set
# has four scenes and three classes:

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
# Every file is read once before training starts. If a label does not fit, the error names it and
# the remedy, before you wait for a GPU:

# %%
Picture.fromarray(np.full((256, 512), 7, np.uint8)).save(own / "labels/3.png")
try:
    check_datasets(["own_city"], num_classes=3)
except DatasetError as error:
    print(error)

# %% [markdown]
# ## Something to try
#
# - Register two folders of your own photographs, one by day and one at night, and add them to the
#   table of distances. (Labels that are all zero are enough for that.)
# - Which domain is nearest by $d_\mu$ alone, or by $d_\sigma$ alone? (`distance` returns both.)
# - `python -m fishertune_d2.data.check --all` says for every data set on this machine whether it is
#   complete.
