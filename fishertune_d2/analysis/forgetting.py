"""Measures how far tuning moves a backbone's features, and how well they separate classes.

python -m fishertune_d2.analysis.forgetting forgetting.json

The command draws again what tools/measure_forgetting.py measured.

Shapes: n patches, m other patches, D and E channels, C classes, (h, w) patches of p x p pixels,
(H, W) pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fishertune_d2.analysis.figures import draw_json_file
from fishertune_d2.analysis.statistics import markdown_table

IGNORED = -1


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same patches.

    It is 1 if one set is the other after a rotation and a scale, and 0 if no channel of one
    correlates with a channel of the other (Kornblith et al., ICML 2019, Eq. 4 with linear kernels).

    Args:
        one: (n, D).
        other: (n, E).

    Returns:
        ||X^T Y||^2 / (||X^T X|| ||Y^T Y||) of the centred features, in float64; 0 .. 1.

    Raises:
        ValueError: if the numbers of patches differ, or the features of a set are all equal.
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} patches cannot be compared with {len(other)} others")
    x, y = (each.double() - each.double().mean(0) for each in (one, other))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    if scale == 0:
        raise ValueError("all patches of a set have the same features: use different images")
    return float((x.T @ y).square().sum() / scale)


def patch_classes(label: np.ndarray, size: tuple[int, int], patch_size: int) -> Tensor:
    """The class of each patch of an image: the class of more than half of its pixels.

    Args:
        label: train ids of any size, uint8; 255 is ignored.
        size: (H, W) of the image that the backbone sees.
        patch_size: p.

    Returns:
        (ceil(H / p), ceil(W / p)) int64, ``IGNORED`` where no class fills half of a patch.
    """
    height, width = size
    resized = np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
    padding = [(0, -side % patch_size) for side in size]
    cells = np.pad(resized, padding, constant_values=255)
    h, w = (side // patch_size for side in cells.shape)
    cells = cells.reshape(h, patch_size, w, patch_size).swapaxes(1, 2).reshape(h * w, -1)
    counts = F.one_hot(torch.from_numpy(cells.astype(np.int64)), 256).sum(1)[:, :255]
    most, classes = counts.max(1)
    classes[most * 2 <= patch_size**2] = IGNORED
    return classes.view(h, w)


def probe_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], ridge: float = 1e-3
) -> float:
    """Accuracy of a linear probe: ridge regression from the features to the classes.

    Args:
        train: features (n, D) and classes (n,) int64.
        test: features (m, D) and classes (m,) int64.
        ridge: the penalty, as a share of the mean variance of a channel.

    Returns:
        The mean over the classes in ``test`` of the share of their patches that the probe finds,
        0 .. 1. The solution has a closed form, so it has no learning rate and no seed.
    """
    features, classes = train
    values, y = classes.unique(return_inverse=True)
    # Every class weighs the same, as in the accuracy; so it does in the mean, or the intercept
    # would depend on how many patches each class has.
    weight = (1 / y.bincount().double())[y]
    mean = (weight[:, None] * features.double()).sum(0) / weight.sum()
    x = features.double() - mean
    hot = F.one_hot(y).double()
    offset = (weight[:, None] * hot).sum(0) / weight.sum()
    gram = x.T @ (weight[:, None] * x)
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + penalty, x.T @ (weight[:, None] * (hot - offset)))
    found = values[((test[0].double() - mean) @ solution + offset).argmax(1)]
    return _mean_over_classes(found, test[1])


def neighbour_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], neighbours: int = 20
) -> float:
    """Accuracy of the vote of the nearest patches by the cosine of their features.

    Args:
        train: features (n, D) and classes (n,) int64.
        test: features (m, D) and classes (m,) int64.
        neighbours: how many patches vote; with equal votes, the lower class wins.

    Returns:
        The mean over the classes in ``test`` of the share of their patches that the vote finds,
        0 .. 1.
    """
    bank = F.normalize(train[0].float())
    count = int(train[1].max()) + 1
    found = []
    for part in F.normalize(test[0].float()).split(1024):  # the whole matrix may not fit in memory
        nearest = (part @ bank.T).topk(min(neighbours, len(bank))).indices
        found.append(F.one_hot(train[1][nearest], count).sum(1).argmax(1))
    return _mean_over_classes(torch.cat(found), test[1])


def _mean_over_classes(found: Tensor, classes: Tensor) -> float:
    return float(
        torch.stack([(found[classes == c] == c).double().mean() for c in classes.unique()]).mean()
    )


def table_of(measured: Mapping[str, Any]) -> str:
    """Formats a Markdown table of what ``tools/measure_forgetting.py`` measured.

    Args:
        measured: ``models``, each with its ``name``, ``cka`` by block, and ``accuracy``: by data
            set the shares ``probe`` and ``neighbours``.

    Returns:
        A line for each model, in percent, with the similarity in the middle and the last block.
    """
    headers = ["backbone", "CKA, middle", "CKA, last"]
    for name in measured["models"][0]["accuracy"]:
        headers += [f"{name}, probe", f"{name}, neighbours"]
    lines = []
    for each in measured["models"]:
        shares = [share for found in each["accuracy"].values() for share in found.values()]
        similar = (each["cka"][len(each["cka"]) // 2 - 1], each["cka"][-1])
        numbers = [f"{value:.3f}" for value in similar] + [f"{100 * s:.1f}" for s in shares]
        lines.append([each["name"], *numbers])
    return markdown_table(lines, headers)


def draw_forgetting(measured: Mapping[str, Any], path: Path) -> None:
    """Draws what ``tools/measure_forgetting.py`` measured.

    Args:
        measured: see :func:`table_of`.
        path: the PNG to write.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    similarity, accuracy = figure.subplots(1, 2)
    models = measured["models"]
    names = list(models[0]["accuracy"])
    for number, each in enumerate(models):
        (line,) = similarity.plot(each["cka"], marker=".", label=each["name"])
        places = np.arange(len(names)) + (number - (len(models) - 1) / 2) * 0.6 / len(models)
        for kind, face in (("probe", line.get_color()), ("neighbours", "none")):
            shares = [100 * found[kind] for found in each["accuracy"].values()]
            style = {"edgecolor": line.get_color(), "facecolor": face}
            accuracy.scatter(places, shares, s=30, **style)
    similarity.set(
        xlabel="block", ylabel="similarity to the public backbone (CKA)", ylim=(None, 1.01)
    )
    accuracy.set(xticks=range(len(names)), ylabel="accuracy of the features in %")
    accuracy.set_xticklabels(names, fontsize=8, rotation=20, ha="right")
    accuracy.set_title("filled: linear probe; hollow: nearest neighbours", fontsize=9)
    figure.legend(*similarity.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw_json_file(__doc__, draw_forgetting)
