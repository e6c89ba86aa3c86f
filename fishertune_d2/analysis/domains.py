"""Measures and draws how far domains are apart in the statistics that Eq. 6 redraws.

Shapes: n images, D channels (3 for pixels).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fishertune_d2.fisher.perturb import token_statistics


def statistics_of(maps: Sequence[Tensor]) -> np.ndarray:
    """Mu and sigma of Eq. 6: mean and standard deviation over space, by image and channel.

    Args:
        maps: pixels or features, (h, w, D) each.

    Returns:
        (n, 2, D), mu before sigma.
    """
    return np.stack(
        [
            np.concatenate([s[0].cpu().numpy() for s in token_statistics(m.flatten(0, 1)[None])])
            for m in maps
        ]
    )


def distance(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The distance of a domain from the source, in the unit of Eq. 6's shift.

    The source's Sigma_mu and Sigma_sigma are the standard deviations of mu and sigma over its
    images. Eq. 6 moves an image by eps times these, with eps from N(0, 1).

    Args:
        source: (n, 2, D), see :func:`statistics_of`.
        target: (m, 2, D).

    Returns:
        (2, D) not negative: the difference of the domains' means, in Sigmas; mu before sigma.

    Raises:
        ValueError: if a statistic of the source is the same in all images, as with one image, so
            that there is no unit.
    """
    spread = source.std(axis=0)  # as in Eq. 6, divisor n
    if not (spread > 0).all():
        raise ValueError(
            f"the {len(source)} images of the source do not differ in every statistic: "
            "use more and different images"
        )
    return np.abs(target.mean(axis=0) - source.mean(axis=0)) / spread


def draw_distances(
    distances: Mapping[str, Mapping[str, float]], path: Path, *, source: str
) -> None:
    """Draws the distance of each domain from the source, by place in the model.

    Args:
        distances: in Sigmas, by domain and place; all domains have the same places.
        path: the PNG to write.
        source: the name of the source domain.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, values in distances.items():
        axes.plot(list(values), list(values.values()), marker="o", label=name)
    axes.axhline(
        np.sqrt(2 / np.pi), color="grey", linestyle=":", label="Eq. 6 at strength 1, mean |eps|"
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("where the statistics are taken")
    axes.set_ylabel(f"distance from {source} in Σ")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
