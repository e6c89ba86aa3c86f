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
# # 7. FisherTune in another Detectron2 project
#
# The tutorials before this one used our trainer and our config. Here the model, the data, the
# optimizer and the trainer belong to another project, and one call adds FisherTune:
#
# ```python
# apply_fishertune(trainer, data_loader, max_iter=..., output_dir=..., warmup=...)
# ```
#
# This notebook shows the arguments of the call, the weights that it may change, its work in each of
# the three stages, and why a zero gradient is not enough to keep a weight unchanged. The notebook
# runs on a CPU, without downloads. The next cell holds the imports.

# %% jupyter={"source_hidden": true}
import os
import tempfile
import warnings

warnings.filterwarnings("ignore", category=FutureWarning)  # of Detectron2's imports

import matplotlib.pyplot as plt
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import ViT
from IPython.display import Image, display
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from fishertune_d2 import apply_fishertune, fisher
from fishertune_d2.analysis.selection_map import draw_run
from fishertune_d2.tuning import SelectedWeights

quick = os.environ.get("FISHERTUNE_NOTEBOOK_QUICK") == "1"
max_iter, warmup = (12, 4) if quick else (80, 20)
torch.set_num_threads(1)  # the tensors are small
torch.manual_seed(0)

# %% [markdown]
# ## The other project's model and data
#
# The model has Detectron2's own `ViT`, the one of ViTDet, with attention in windows, and a head
# that gives each patch one of three classes. Like every Detectron2 model in training, it takes a
# list of dicts and returns **losses by name, one number for the whole batch**.


# %%
class PatchClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ViT(
            img_size=64, patch_size=8, embed_dim=48, depth=6, num_heads=2, use_rel_pos=True,
            window_size=4, window_block_indexes=[0, 1, 3, 4], pretrain_img_size=64,
        )  # fmt: skip
        self.head = nn.Conv2d(48, 3, 1)

    def predict(self, batch):
        return self.head(self.backbone(torch.stack([item["image"] for item in batch]))["last_feat"])

    def forward(self, batch):
        labels = torch.stack([item["label"] for item in batch])
        return {"loss_patch": F.cross_entropy(self.predict(batch), labels)}


def draw_batches(seed, size=4):
    """Noise with a reddish and a bluish square in it, without end."""
    random = torch.Generator().manual_seed(seed)
    while True:
        batch = []
        for _ in range(size):
            image, label = torch.randn(3, 64, 64, generator=random), torch.zeros(8, 8).long()
            for kind, channel in ((1, 0), (2, 2)):
                y, x = torch.randint(0, 5, (2,), generator=random).tolist()
                image[channel, 8 * y : 8 * y + 32, 8 * x : 8 * x + 32] += 1.5
                label[y : y + 4, x : x + 4] = kind
            batch.append({"image": image, "label": label})
        yield batch


model = PatchClassifier()
examples = next(draw_batches(seed=0))
figure, axes = plt.subplots(2, 4, figsize=(8, 4), layout="constrained")
for i, item in enumerate(examples):
    axes[0, i].imshow((item["image"].permute(1, 2, 0) / 6 + 0.4).clamp(0, 1))
    axes[1, i].imshow(item["label"], cmap="viridis", vmin=0, vmax=2)
for axis in axes.flat:
    axis.set_axis_off()
axes[0, 0].set_title("images", loc="left")
axes[1, 0].set_title("the class of each patch", loc="left")
plt.show()

# %% [markdown]
# ## The weights that may change (Eq. 3)
#
# The candidates are the query, key and value projections and the feed-forward layers of every
# block. `find_candidates` recognises them by the parameters' names, which are the same in timm and
# in Detectron2: `blocks.<i>.attn.qkv`, `blocks.<i>.mlp.fc1`, `fc2`. Here one matrix holds the three
# projections, as three groups of rows.

# %%
candidates = fisher.find_candidates(model.backbone)
total = sum(p.numel() for p in model.backbone.parameters())
for kind in fisher.KINDS:
    count = sum(c.numel for c in candidates if c.kind == kind)
    print(f"{kind:3} {count:7,} of {total:,} backbone weights, {100 * count / total:.0f} %")

# %% [markdown]
# ## The other project's trainer, and one call
#
# The optimizer is SGD with momentum and a strong weight decay, and holds all weights of the model.
# The call does not change the optimizer; it registers hooks:
#
# | iterations | what happens |
# |---|---|
# | 0 to T1 (`warmup`) | the head trains, the backbone keeps its values |
# | at T1 | the Fisher information is measured and all candidates are ranked; no weight changes |
# | T1 to the end | the head and a growing share of the selected weights train |
#
# The Fisher information of weight $n$ is the mean over images of a **square**,
#
# $$F_n(x) = \frac{1}{N} \sum_{i=1}^{N} \left(\frac{\partial L_i}{\partial \theta_n}\right)^2
# \qquad\text{(Eq. 8, 9)}$$
#
# and a batch's loss $\frac{1}{B}\sum_i L_i$ does not contain the squares of its images. So the
# model receives **one image at a time**, which works for every model that Detectron2 can train.
# $F(x')$ is measured in the same way, with shifted statistics of the features (Eq. 6), which are
# drawn for the whole batch. $F(x)$ and $F(x')$ give the score (Eq. 15). The estimate needs a second
# data loader, because the trainer's own would lose its position.

# %%
before = {name: p.detach().clone() for name, p in model.named_parameters()}
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
trainer = SimpleTrainer(model, draw_batches(seed=1), optimizer)

output = tempfile.TemporaryDirectory()
estimation = apply_fishertune(
    trainer,
    draw_batches(seed=2),
    max_iter=max_iter,
    output_dir=output.name,
    warmup=warmup,
    batches=2 if quick else 8,
)
trainer.train(0, max_iter)

# %% [markdown]
# ## What moved
#
# The share of the backbone that may change grows from 1 % to 5 % (Eq. 16, `fisher.tuned_share`).
# The figure shows the loss, and the number of weights in this share.

# %%
history = {
    name: trainer.storage.history(name).values()
    for name in ("total_loss", "fisher/tuned_parameters")
}
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
titles = ("loss", "backbone weights that may move")
for axis, title, values in zip(axes, titles, history.values(), strict=True):
    axis.plot([iteration for _, iteration in values], [value for value, _ in values])
    axis.axvline(warmup, color="grey", linestyle="--", linewidth=1)
    axis.set(title=title, xlabel="iteration", xlim=(0, max_iter - 1), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].annotate(" T1", (warmup, axes[0].get_ylim()[1]), va="top", color="grey")
plt.show()

# %%
selection = estimation.selection
masks = selection.masks(selection.share)
rows = {"backbone, selected": [0, 0], "backbone, not selected": [0, 0], "head": [0, 0]}
for name, parameter in model.named_parameters():
    moved = parameter.detach() != before[name]
    mask = masks.get(name.removeprefix("backbone."), torch.zeros_like(moved))
    places = {"backbone, selected": mask, "backbone, not selected": ~mask}
    if name.startswith("head."):
        places = {"head": torch.ones_like(moved)}
    for row, place in places.items():
        rows[row][0] += int(place.sum())
        rows[row][1] += int(moved[place].sum())
table = [[row, *numbers] for row, numbers in rows.items()]
print(tabulate(table, ["weights", "all", "moved"], intfmt=","))

# %% [markdown]
# All weights that were not selected keep their value, to the bit. The map shows where the selected
# weights are:

# %%
display(Image(filename=draw_run(output.name), width=760))

# %% [markdown]
# This ViT started from random weights. Its attention is nearly even over the patches, so queries
# and keys hardly matter. A pretrained model has another map; tutorial 1 draws one.

# %% [markdown]
# ## Why a zero gradient is not enough
#
# It seems enough to set the gradients of all other weights to zero. But an optimizer does more than
# follow gradients. With momentum $v$ and weight decay $\lambda$, SGD's step is
#
# $$v \leftarrow \mu v + g + \lambda\theta, \qquad \theta \leftarrow \theta - \eta v,$$
#
# which moves $\theta$ even if $g = 0$. `apply_fishertune` therefore uses `MaskedUpdate`, a hook on
# the optimizer: it masks the gradients before each step, **and** restores the unselected weights
# after it.

# %%
weight = nn.Parameter(torch.ones(()))
decaying = torch.optim.SGD([weight], lr=0.05, momentum=0.9, weight_decay=0.01)
for _ in range(max_iter):
    weight.grad = torch.zeros(())
    decaying.step()
print(f"a weight of 1 after {max_iter} steps with a gradient of zero: {weight.item():.3f}")

# %% [markdown]
# ## In your own training loop
#
# An existing optimizer stays dense: it keeps gradients and moments for weights that never change.
# If you build the optimizer yourself, after the estimate, `SelectedWeights` gives it only the
# selected weights: one vector for each tensor. Our own trainer does this. `SelectedWeights` and
# `fishertune_d2.fisher` need no Detectron2.

# %%
selected = SelectedWeights(model.backbone, selection)
vectors = selected.parameters()
print(f"dense:    {sum(p.numel() for p in before.values()):8,} numbers in the optimizer")
head = sum(p.numel() for p in model.head.parameters())
print(f"selected: {sum(v.numel() for v in vectors.values()) + head:8,}, with the head")
selected.release()  # the plain model again, with the same weights
output.cleanup()

# %% [markdown]
# ## Something to try
#
# - Give `apply_fishertune` a `loss_fn(model, batch)` that returns the loss of **each** image, shape
#   (B,): `F.cross_entropy(model.predict(batch), labels, reduction="none").mean((1, 2))`. With it,
#   `estimator="diagonal"` measures the same $F$ in one pass for each batch. How much faster is it?
#   Is the selection the same?
# - Switch the shift off, `perturb=fisher.StatisticsPerturbation.of_vit(model.backbone,
#   strength=0.0)`: then $\Delta F = 0$, and $F$ alone decides. `fisher.overlap(a, b)` returns the
#   share of a selection that stays.
# - Set `warmup=0`. The head is random when the Fisher information is measured: which blocks are
#   selected now?
# - Put the call into your own training script, before it loads the checkpoint. `docs/reuse.md` says
#   where, and `examples/vitdet_mask_rcnn.py` does it with Mask R-CNN from a LazyConfig.
