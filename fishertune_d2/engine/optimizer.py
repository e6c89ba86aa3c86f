"""The optimizer of one training stage."""

from itertools import chain
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from fishertune_d2.config import require_choice
from fishertune_d2.tuning import build_tuning_method

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "ADAMW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
}
# The head's embeddings, by parts of their names. Tuning methods name their own (``undecayed``).
_HEAD_EMBEDDINGS = (
    *("queries_embedder", "queries_features", "level_embed"),
    *("predictor.no_object", "prompts.context"),
)

# The end of the name of the values that SelectedWeights trains of a bias.
_SELECTED_BIAS = ".parametrizations.bias.0.values"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds SOLVER.OPTIMIZER for the parameters that require a gradient now.

    The backbone's learning rate is BASE_LR * BACKBONE_MULTIPLIER. Biases have BIAS_LR_FACTOR times
    the rate of their part. Norms have WEIGHT_DECAY_NORM, biases WEIGHT_DECAY_BIAS if it is set, and
    the head's embeddings and the tuning method's ``undecayed`` parameters WEIGHT_DECAY_EMBED.

    Args:
        cfg: SOLVER and TUNING are read.
        model: its parameters named ``backbone.*`` are the backbone's.

    Returns:
        The optimizer.
    """
    solver = cfg.SOLVER
    require_choice("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        # Detectron2's bias_lr_factor would drop the backbone's multiplier from biases.
        lr_factor_func=lambda name: _rate(name, solver),
    )
    parts = (*_HEAD_EMBEDDINGS, *build_tuning_method(cfg).undecayed)
    undecayed = {p for name, p in model.named_parameters() if any(part in name for part in parts)}
    decay = solver.WEIGHT_DECAY_EMBED
    groups = [part for group in groups for part in _split(group, undecayed, decay)]
    if solver.WEIGHT_DECAY_BIAS is not None:  # Detectron2 does not see selected biases
        biases = {p for name, p in model.named_parameters() if name.endswith(_SELECTED_BIAS)}
        decay = solver.WEIGHT_DECAY_BIAS
        groups = [part for group in groups for part in _split(group, biases, decay)]
    optimizer_class = OPTIMIZERS[solver.OPTIMIZER]
    # Not False, with which torch would step one tensor at a time, on GPUs too.
    options: dict[str, Any] = {"fused": True if solver.FUSED else None}
    if solver.OPTIMIZER == "SGD":
        options |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        return _clip_full_model(optimizer_class, clip.CLIP_VALUE, clip.NORM_TYPE)(groups, **options)
    return maybe_add_gradient_clipping(cfg, optimizer_class)(groups, **options)


def is_backbone(name: str) -> bool:
    """Whether a parameter of the segmentor, given by name, belongs to the backbone."""
    return name.startswith("backbone.")


def _rate(name: str, solver: CfgNode) -> float:
    """A parameter's learning rate as a multiple of BASE_LR."""
    rate = solver.BACKBONE_MULTIPLIER if is_backbone(name) else 1.0
    return rate * solver.BIAS_LR_FACTOR if name.endswith((".bias", _SELECTED_BIAS)) else rate


def carry_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Copies the moments of the parameters that both optimizers hold."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def set_iteration(scheduler: torch.optim.lr_scheduler.LRScheduler, iteration: int) -> None:
    """Sets the learning rates of an iteration; Detectron2's schedules are functions of it."""
    scheduler.last_epoch = iteration  # a new schedule starts at 0
    rates = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _split(group: dict, others: set, decay: float) -> list[dict]:
    """Moves the other parameters of a group into a group of their own, with ``decay``."""
    plain = [p for p in group["params"] if p not in others]
    rest = [p for p in group["params"] if p in others]
    parts = [{**group, "params": plain}, {**group, "params": rest, "weight_decay": decay}]
    return [part for part in parts if part["params"]]


def _clip_full_model(optimizer_class: type, max_norm: float, norm_type: float) -> type:
    """Makes ``optimizer_class`` scale all gradients together to a norm of at most ``max_norm``."""

    # Detectron2's own clipping treats each parameter alone. Mask2Former's configs ask for this one.
    class FullModelClipping(optimizer_class):
        def step(self, closure=None):
            parameters = chain.from_iterable(group["params"] for group in self.param_groups)
            torch.nn.utils.clip_grad_norm_(list(parameters), max_norm, norm_type)
            return super().step(closure)

    return FullModelClipping
