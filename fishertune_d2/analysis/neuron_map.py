"""Draws which heads and neurons a selection holds, and what single neurons respond to.

A neuron is a channel of Q, K or V, or a hidden neuron of the feed-forward network, see
:mod:`fishertune_d2.fisher.units`.

Shapes: B blocks, H heads, (h, w) patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn

from fishertune_d2.analysis.features import blocks_of, patch_features
from fishertune_d2.analysis.selection_map import shares_by_group
from fishertune_d2.fisher import KINDS, FisherEstimate, Selection, Units, domain_related_fisher
from fishertune_d2.fisher.candidates import groups_of
from fishertune_d2.fisher.units import UnitGroup
from fishertune_d2.modeling import VFMSegmentor


@dataclass(frozen=True)
class Neuron:
    """A neuron of a backbone.

    Attributes:
        group: the name of its group in :class:`Units`, such as ``"vit.blocks.3.FFN"``.
        index: its place in the group, from 0.
        score: its score, divided by the mean of all neurons.
    """

    group: str
    index: int
    score: float

    @property
    def kind(self) -> str:
        """``"Q"``, ``"K"``, ``"V"`` or ``"FFN"``."""
        return self.group.rpartition(".")[2]

    @property
    def block(self) -> int:
        """The index of its block, from 0."""
        return int(self.group.rsplit(".", 2)[1])


def shares_by_head(selection: Selection, num_heads: int) -> dict[str, np.ndarray]:
    """The selected share of each head's weights in Q, K and V, in percent.

    If the selection is of neurons, this is also the share of the head's channels.

    Args:
        selection: of weights or neurons.
        num_heads: H, the number of heads in each block.

    Returns:
        (B, H) by kind; NaN where a block has no such weights.

    Raises:
        ValueError: if the channels of a block do not split into ``num_heads`` heads.
    """
    masks: dict[tuple[str, int], list[np.ndarray]] = {}
    groups = groups_of(selection.shapes)
    for name, mask in selection.masks(selection.share).items():
        for kind, block, rows in groups[name]:
            if kind == "FFN":
                continue
            part = mask[rows]
            if len(part) % num_heads:
                raise ValueError(
                    f"{kind} of block {block} has {len(part)} channels, which do not split into "
                    f"{num_heads} heads: pass num_heads of the backbone's attention"
                )
            heads = part.reshape(num_heads, -1).numpy()
            masks.setdefault((kind, block), []).append(heads)
    depth = 1 + max(block for _, block in selection.group_sizes())
    shares = {kind: np.full((depth, num_heads), np.nan) for kind in KINDS if kind != "FFN"}
    for (kind, block), parts in masks.items():
        shares[kind][block] = 100 * np.concatenate(parts, axis=1).mean(axis=1)
    return shares


def draw_heads(selection: Selection, num_heads: int, path: Path) -> None:
    """Draws :func:`shares_by_head`, and the share of each feed-forward network beside it.

    Args:
        selection: of weights or neurons.
        num_heads: the number of heads in each block.
        path: the PNG to write.
    """
    heads = shares_by_head(selection, num_heads)
    network = np.nan_to_num(shares_by_group(selection)[KINDS.index("FFN")])
    blocks = range(len(network))
    top = float(np.nan_to_num(list(heads.values())).max()) or 1.0
    norm = Normalize(0, top)
    size = (3.4 + 0.9 * num_heads, 1.3 + 0.21 * len(blocks))
    figure = Figure(figsize=size, layout="constrained")
    widths = [0.3 * num_heads] * len(heads) + [2]
    *panels, bars = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    for axes, (kind, shares) in zip(panels, heads.items(), strict=True):
        image = axes.imshow(shares, cmap="viridis", aspect="auto", norm=norm)
        for (block, head), share in np.ndenumerate(shares):
            color = "black" if share > 0.6 * top else "white"
            axes.text(head, block, f"{share:.0f}", ha="center", va="center", color=color, size=6)
        axes.set_title(f"heads of {kind}", fontsize=9)
        axes.set_xticks(range(num_heads))
        axes.set_xlabel("head")
    figure.colorbar(image, ax=panels, label="% of the head", pad=0.01)
    bars.barh(blocks, network)
    for block, share in enumerate(network):
        bars.text(share, block, f" {share:.1f}", va="center", size=6)
    bars.margins(x=0.25)
    bars.set_title("feed-forward network", fontsize=9)
    bars.set_xlabel("% of the network")
    panels[0].set_yticks(blocks)
    panels[0].set_ylabel("block")
    count = selection.weights(selection.share)
    figure.suptitle(
        f"selected {selection.unit}s: {count:,} of {selection.base:,} weights "
        f"({100 * count / selection.base:.1f} %)",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def most_sensitive(estimate: FisherEstimate, count: int = 10, **options) -> list[Neuron]:
    """The neurons with the highest DRF of means, best first.

    Args:
        estimate: F(x) and F(x') by parameter name.
        count: the number of neurons.
        options: those of :func:`domain_related_fisher`, such as ``Run.score_options``.

    Returns:
        The neurons, with DRF over the mean DRF of all neurons.
    """
    drf = domain_related_fisher(estimate.by_unit(Units("neuron", estimate.shapes)), **options)
    mean = torch.cat(list(drf.values())).double().mean().item()
    neurons = [
        Neuron(group, index, score / mean)
        for group, scores in drf.items()
        for index, score in enumerate(scores.tolist())
    ]
    return sorted(neurons, key=lambda neuron: neuron.score, reverse=True)[:count]


@torch.no_grad()
def neuron_activations(
    model: VFMSegmentor, neurons: Sequence[Neuron], images: Sequence[dict]
) -> list[Tensor]:
    """The activation of neurons at each patch.

    A hidden neuron's activation is the input of fc2: after the nonlinearity, the gate and the norm,
    where a model has them. A channel's is the projection's output, before norms of queries and keys
    and before rotary positions.

    Args:
        model: the segmentor.
        neurons: neurons of its backbone.
        images: dicts with ``image`` (3, H, W), 0 .. 255; sizes may differ.

    Returns:
        (neurons, h, w) for each image.
    """
    backbone = model.backbone
    parameters = dict(backbone.named_parameters())
    units = Units("neuron", {name: tuple(value.shape) for name, value in parameters.items()})
    maps: dict[str, list[Tensor]] = {}  # (h, w, units) of each image, by group
    for group, neuron in {neuron.group: neuron for neuron in neurons}.items():
        block = blocks_of(backbone)[neuron.block]
        # No hooks on fc2 and the projections, because some models read only their weights.
        module = block.get_submodule("mlp.norm" if neuron.kind == "FFN" else "norm1")
        maps[group] = patch_features(model, images, module)
        if neuron.kind != "FFN":
            maps[group] = [_project(each, units.groups[group], parameters) for each in maps[group]]
    return [
        torch.stack([maps[neuron.group][i][..., neuron.index] for neuron in neurons])
        for i in range(len(images))
    ]


def _project(features: Tensor, group: UnitGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """Q, K or V (h, w, units) of the attention's input (h, w, D), without the other two."""
    rows = [parameters[p.name][p.start : p.start + group.count] for p in group.parts]
    weight, *bias = sorted(rows, key=Tensor.dim, reverse=True)  # some models have no bias
    return nn.functional.linear(features, weight, *bias)


def draw_neurons(
    model: VFMSegmentor, neurons: Sequence[Neuron], images: Mapping[str, dict], path: Path
) -> None:
    """Draws :func:`neuron_activations` over images, a row for each neuron.

    All images of a row share one colour scale.

    Args:
        model: the segmentor.
        neurons: neurons of its backbone.
        images: by the name to print above, dicts with ``image`` (3, H, W), 0 .. 255.
        path: the PNG to write.
    """
    maps = neuron_activations(model, neurons, list(images.values()))
    height, width = next(iter(images.values()))["image"].shape[-2:]
    rows, columns = 1 + len(neurons), len(images)
    size = (2.9 * columns + 0.7, rows * (2.8 * height / width + 0.25))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns + 1, squeeze=False, width_ratios=[1] * columns + [0.04])
    for axes, (name, item) in zip(grid[0], images.items(), strict=False):
        axes.imshow(item["image"].permute(1, 2, 0).numpy())
        axes.set_title(name, fontsize=9)
    grid[0, -1].set_axis_off()
    for i, (neuron, row) in enumerate(zip(neurons, grid[1:], strict=True)):
        own = [values[i].float().cpu().numpy() for values in maps]
        # A few patches of extreme values must not hide all others.
        ends = np.percentile(np.concatenate([values.ravel() for values in own]), [1, 99])
        norm = Normalize(*ends)
        for axes, values, item in zip(row, own, images.values(), strict=False):
            shown = _draw_over(axes, values, item["image"], model.backbone.patch_size, norm)
        what = "neuron" if neuron.kind == "FFN" else "channel"
        row[0].set_title(
            f"block {neuron.block}, {neuron.kind} {what} {neuron.index}: "
            f"DRF {neuron.score:.0f} times the mean",
            fontsize=9,
            loc="left",
        )
        bar = figure.colorbar(shown, cax=row[-1], extend="both")
        bar.set_label("activation", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    for axes in grid[:, :-1].flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=100)


def _draw_over(
    axes: Axes, values: np.ndarray, image: Tensor, patch_size: int, norm: Normalize
) -> AxesImage:
    """Draws a map (h, w) over an image (3, H, W) in grey, whose own range of light is used."""
    height, width = image.shape[-2:]
    axes.imshow(image.float().mean(dim=0).numpy(), cmap="gray")
    right, bottom = (cells * patch_size - 0.5 for cells in (values.shape[1], values.shape[0]))
    extent = (-0.5, right, bottom, -0.5)
    shown = axes.imshow(values, cmap="viridis", norm=norm, alpha=0.65, extent=extent)
    axes.set_xlim(-0.5, width - 0.5)  # the last patches may cover padding
    axes.set_ylim(height - 0.5, -0.5)
    return shown
