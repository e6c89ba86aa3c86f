"""Draws images of several domains by their features in two dimensions, as the paper's Fig. 7.

Shapes: n images, D channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fishertune_d2.analysis.figures import MARKERS


def mean_features(maps: Sequence[Tensor]) -> np.ndarray:
    """The mean feature of each image over its patches.

    Args:
        maps: (h, w, D) each.

    Returns:
        (n, D).
    """
    return np.stack([features.flatten(0, 1).mean(dim=0).cpu().numpy() for features in maps])


def domain_purity(features: Mapping[str, np.ndarray]) -> float:
    """The share of images whose most similar other image is of the same domain.

    The cosine of two features is their similarity. The share is 1 where domains are separate.
    Where they mix, it falls to the domain's share of the other images.

    Args:
        features: features by domain, (n, D).

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: if there are fewer than two images.
    """
    values, domains = np.concatenate(list(features.values())), _domains(features)
    if len(values) < 2:
        raise ValueError(f"{len(values)} images: give at least two to compare")
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    similarity = values @ values.T
    np.fill_diagonal(similarity, -np.inf)
    return float((domains[similarity.argmax(axis=1)] == domains).mean())


def embed(features: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Embeds the images of all domains together by t-SNE, which preserves neighbours.

    Args:
        features: features by domain, (n, D).
        seed: the seed of the embedding.

    Returns:
        Points by domain, (n, 2). Axes and distances between groups have no meaning.

    Raises:
        ImportError: if scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "t-SNE needs scikit-learn: pip install 'fishertune-d2[notebooks]'"
        ) from error
    values = np.concatenate(list(features.values())).astype(np.float64)
    perplexity = min(30.0, (len(values) - 1) / 3)  # scikit-learn's default, or its upper limit
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)
    domains = _domains(features)
    return {name: points[domains == i] for i, name in enumerate(features)}


def draw_embeddings(panels: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Draws :func:`embed` of several models beside each other.

    Args:
        panels: features by model and domain, (n, D).
        path: the PNG to write.
    """
    figure = Figure(figsize=(1.2 + 3 * len(panels), 3.2), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)
    for axes, (model, features) in zip(row[0], panels.items(), strict=True):
        for (domain, points), marker in zip(embed(features).items(), MARKERS * 9, strict=False):
            axes.scatter(*points.T, s=22, marker=marker, alpha=0.8, linewidths=0, label=domain)
        axes.set_title(
            f"{model}: nearest image of the same domain {100 * domain_purity(features):.0f} %",
            fontsize=8,
        )
        axes.set_xlabel("t-SNE 1", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    row[0, 0].set_ylabel("t-SNE 2", fontsize=8)
    row[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def _domains(features: Mapping[str, np.ndarray]) -> np.ndarray:
    """The index of each image's domain, (n,)."""
    return np.repeat(np.arange(len(features)), [len(values) for values in features.values()])
