"""Random choices of units: among all candidates, one kind (Table 4), or a group (Fig. 3)."""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.fisher import KINDS, Candidate, FisherEstimate, Units, find_candidates

from .registry import TUNING_REGISTRY, SelectiveMethod, TuningMethod


class RandomChoice(SelectiveMethod):
    """Trains units drawn uniformly among the candidates, whatever their sizes.

    Args:
        seed: seed of the draw.
        kinds: the kinds to draw from.
        depth: the part of the blocks to draw from; (0.0, 0.5) is the first half.
    """

    options = ("GROUP",)
    estimates = False

    def __init__(
        self,
        seed: int,
        kinds: tuple[str, ...] = KINDS,
        depth: tuple[float, float] = (0.0, 1.0),
    ):
        self.seed = seed
        self.kinds = kinds
        self.depth = depth

    def scores(self, backbone: nn.Module, estimate: FisherEstimate | None) -> Mapping[str, Tensor]:
        """:meth:`unit_scores` of single weights."""
        shapes = {name: tuple(p.shape) for name, p in self.parameters(backbone).items()}
        return self.unit_scores(backbone, estimate, Units("weight", shapes))

    def unit_scores(
        self, backbone: nn.Module, estimate: FisherEstimate | None, units: Units
    ) -> Mapping[str, Tensor]:
        """Uniform numbers in (0, 1] for the units to draw from, and 0 for the others."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = {}
        for group, chosen in self.selectable(backbone, units).items():
            # float32 has 24 bits: among millions, ties occur, and the position breaks them.
            drawn = 1.0 - torch.rand(int(chosen.sum()), generator=generator)
            scores[group] = torch.zeros(chosen.shape).masked_scatter(chosen, drawn)
        return scores

    def candidates(self, backbone: nn.Module) -> list[Candidate]:
        """The candidates of the kinds and blocks to draw from."""
        every = find_candidates(backbone)
        blocks = 1 + max(candidate.block for candidate in every)
        first, end = (round(part * blocks) for part in self.depth)
        return [c for c in every if c.kind in self.kinds and first <= c.block < end]


@TUNING_REGISTRY.register()
def random(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD random``."""
    return RandomChoice(cfg.SEED)


@TUNING_REGISTRY.register()
def random_q(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD random_q``."""
    return RandomChoice(cfg.SEED, ("Q",))


@TUNING_REGISTRY.register()
def random_k(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD random_k``."""
    return RandomChoice(cfg.SEED, ("K",))


@TUNING_REGISTRY.register()
def random_v(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD random_v``."""
    return RandomChoice(cfg.SEED, ("V",))


@TUNING_REGISTRY.register()
def group(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD group``; refuses unknown kinds and depths outside 0 to 1."""
    kinds, depth = tuple(cfg.TUNING.GROUP.KINDS), tuple(cfg.TUNING.GROUP.DEPTH)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"TUNING.GROUP.KINDS is {list(kinds)}: choose from {', '.join(KINDS)}")
    if len(depth) != 2 or not 0.0 <= depth[0] < depth[1] <= 1.0:
        raise ValueError(
            f"TUNING.GROUP.DEPTH is {list(depth)}: give its start and its end, from 0.0 to 1.0"
        )
    return RandomChoice(cfg.SEED, kinds, depth)
