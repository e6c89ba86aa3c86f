"""The optimizer of one training stage."""

from itertools import chain

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

# Embeddings that are parameters of their own, or of an nn.Embedding: the head's, and those that
# tuning methods add: tokens, prompts, and factors, which would decay towards 0, not to where they
# began (of what Rein's tokens add; of a layer's outputs in IA3, of a weight's columns in DoRA).
_EMBEDDINGS = (
    "queries_embedder",
    "queries_features",
    "level_embed",
    "learnable_tokens",
    "prompts",
    ".scale",
    "ia3_l",
    "lora_magnitude_vector",
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW (or SGD) over the parameters that require a gradient now.

    The backbone's learning rate is BASE_LR * BACKBONE_MULTIPLIER, that of biases BIAS_LR_FACTOR
    times what their part has. Norms have WEIGHT_DECAY_NORM, biases WEIGHT_DECAY_BIAS if it is set,
    embeddings, tokens and prompts WEIGHT_DECAY_EMBED.

    Args:
        cfg: SOLVER is read.
        model: its parameters named ``backbone.*`` count as the backbone's.

    Raises:
        ValueError: if SOLVER.OPTIMIZER is unknown.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        # Not Detectron2's bias_lr_factor, which takes the backbone's multiplier away from biases.
        lr_factor_func=lambda name: _rate(name, solver),
    )
    embeddings = {p for name, p in model.named_parameters() if any(e in name for e in _EMBEDDINGS)}
    groups = [part for group in groups for part in _split(group, embeddings, solver)]
    if solver.OPTIMIZER == "ADAMW":
        optimizer_class, options = torch.optim.AdamW, {}
    elif solver.OPTIMIZER == "SGD":
        optimizer_class, options = torch.optim.SGD, {"momentum": solver.MOMENTUM}
        options["nesterov"] = solver.NESTEROV
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: choose ADAMW or SGD")
    clip = solver.CLIP_GRADIENTS
    # Not False, with which torch would step one tensor at a time, on GPUs too.
    options["fused"] = True if solver.FUSED else None
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        return _clip_full_model(optimizer_class, clip.CLIP_VALUE, clip.NORM_TYPE)(groups, **options)
    return maybe_add_gradient_clipping(cfg, optimizer_class)(groups, **options)


def is_backbone(name: str) -> bool:
    """Whether a parameter of the segmentor belongs to the backbone, by its name."""
    return name.startswith("backbone.")


def _rate(name: str, solver: CfgNode) -> float:
    """A parameter's learning rate as a multiple of BASE_LR."""
    rate = solver.BACKBONE_MULTIPLIER if is_backbone(name) else 1.0
    return rate * solver.BIAS_LR_FACTOR if name.endswith(".bias") else rate


def carry_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Gives ``new`` the moments that ``old`` has for the parameters in both."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def _split(group: dict, embeddings: set, solver: CfgNode) -> list[dict]:
    """Takes the embeddings out of a parameter group into one with their own weight decay."""
    plain = [p for p in group["params"] if p not in embeddings]
    embedded = [p for p in group["params"] if p in embeddings]
    parts = [
        {**group, "params": plain},
        {**group, "params": embedded, "weight_decay": solver.WEIGHT_DECAY_EMBED},
    ]
    return [part for part in parts if part["params"]]


def _clip_full_model(optimizer_class: type, max_norm: float, norm_type: float) -> type:
    """``optimizer_class`` that scales all gradients together to a norm of at most ``max_norm``.

    Detectron2's own clipping looks at one parameter at a time; Mask2Former's configs ask for this.
    """

    class FullModelClipping(optimizer_class):
        def step(self, closure=None):
            parameters = chain.from_iterable(group["params"] for group in self.param_groups)
            torch.nn.utils.clip_grad_norm_(list(parameters), max_norm, norm_type)
            return super().step(closure)

    return FullModelClipping
