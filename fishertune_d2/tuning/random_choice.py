"""A random choice of weights: of all candidates, or of one kind (Table 4's rows)."""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.fisher import KINDS, FisherEstimate, find_candidates

from .registry import TUNING_REGISTRY, SelectiveMethod, TuningMethod


class RandomChoice(SelectiveMethod):
    """Trains candidates drawn uniformly.

    Args:
        seed: of the draw.
        kinds: which kinds to draw from.
    """

    estimates = False

    def __init__(self, seed: int, kinds: tuple[str, ...] = KINDS):
        self.seed = seed
        self.kinds = kinds

    def scores(self, backbone: nn.Module, estimate: FisherEstimate | None) -> Mapping[str, Tensor]:
        """Uniform numbers in (0, 1] for the candidates of these kinds, 0 for the others."""
        generator = torch.Generator().manual_seed(self.seed)
        scores: dict[str, Tensor] = {}
        for candidate in find_candidates(backbone):
            parameter, rows = candidate.parameter, candidate.rows
            score = scores.setdefault(candidate.name, torch.zeros_like(parameter))
            if candidate.kind in self.kinds:
                # float32 has 24 bits: among millions, ties occur, and are broken by position.
                drawn = 1.0 - torch.rand(parameter[rows].shape, generator=generator)
                score[rows] = drawn.to(score)
        return scores


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
