"""Floating-point precision of training, scoring and the Fisher estimate, as a config names it."""

from contextlib import AbstractContextManager

import torch
from detectron2.config import CfgNode

from fishertune_d2.config import require_choice

# SOLVER.AMP.PRECISION: the dtype that autocast computes in.
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# FISHER.PRECISION: the dtype that autocast computes the estimate's losses and gradients in. Never
# float16, in which squares of gradients underflow.
ESTIMATE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
# SOLVER.MATMUL_PRECISION, as torch calls them.
_MATMUL_PRECISIONS = ("highest", "high", "medium")


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The dtype that SOLVER.AMP asks for; None if it is off."""
    precision = cfg.SOLVER.AMP.PRECISION
    require_choice("SOLVER.AMP.PRECISION", precision, _DTYPES)
    return _DTYPES[precision] if cfg.SOLVER.AMP.ENABLED else None


def scoring_autocast(cfg: CfgNode, device: torch.device) -> AbstractContextManager:
    """The autocast of training, under which a model on ``device`` is scored and predicts too."""
    dtype = autocast_dtype(cfg)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_matmul_precision(cfg: CfgNode) -> None:
    """Applies SOLVER.MATMUL_PRECISION to float32 products and convolutions of the whole process."""
    precision = cfg.SOLVER.MATMUL_PRECISION
    require_choice("SOLVER.MATMUL_PRECISION", precision, _MATMUL_PRECISIONS)
    torch.set_float32_matmul_precision(precision)
    # By default torch lets convolutions use TF32 even where matrix products are in float32.
    torch.backends.cudnn.allow_tf32 = precision != "highest"
