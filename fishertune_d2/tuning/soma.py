"""SoMA (Yun et al., CVPR 2025): trains the minor singular components of the deeper blocks.

A linear layer y = W x + b with the singular value decomposition W = U S V^T becomes
y = W_res x + B (A x) + b, where B = U_r S_r^(1/2) and A = S_r^(1/2) V_r^T hold the r smallest
singular values, and W_res = W - B A the others. A, B and b train; W_res stays frozen. peft's LoRA
computes the sum, and writes B A into the weight again when it merges.

Shapes: W (out, in), B (out, r), A (r, in).
"""

from typing import cast

import torch
from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from .peft_tuners import PeftTuner
from .registry import TUNING_REGISTRY, TuningMethod, require_vit
from .split_qkv import split_qkv


class SoMA(PeftTuner):
    """Trains A, B and b of all linear layers in the blocks from a third of the depth on.

    These are the layers of queries, keys and values, one by one, the layer behind the attention,
    and those of the MLP; a layer without b has none. On a ViT-L with rank 16 they have the
    4,866,048 parameters that are published. A checkpoint holds W_res, so that a resumed run goes on
    with the same bits.

    Args:
        rank: r.
    """

    options = ("SOMA",)

    def __init__(self, rank: int):
        if rank < 1:
            raise ValueError(f"TUNING.SOMA.RANK is {rank}: choose above 0")
        self.rank = rank
        # peft adds lora_alpha / r * B A, and trains the biases of the layers that it wraps.
        super().__init__("LORA", [], {"r": rank, "lora_alpha": rank, "bias": "lora_only"})

    def find_targets(self, vit: nn.Module) -> list[str]:
        """Finds the linear layers, and splits fused ones of queries, keys and values.

        Args:
            vit: the ViT, without peft's layers.

        Returns:
            The layers' names in ``vit``.

        Raises:
            ValueError: if a layer has fewer singular values than r, or the model is no plain ViT.
        """
        require_vit(vit, "soma")
        blocks = dict(vit.get_submodule("blocks").named_children())
        first = len(blocks) // 3
        split_qkv(vit, first)
        layers = {
            f"blocks.{i}.{name}": layer.weight
            for i, block in list(blocks.items())[first:]
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        }
        most = min(min(weight.shape) for weight in layers.values())
        if self.rank > most:
            raise ValueError(
                f"TUNING.SOMA.RANK is {self.rank}: the smallest layer of this backbone has {most} "
                "singular values, so choose at most that"
            )
        return list(layers)

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Wraps the layers, and moves the minor components of their weights into A and B."""
        super().attach(backbone, head)
        layers = [module for module in backbone.modules() if hasattr(module, "lora_A")]
        # The decompositions of a ViT-L take a minute on a CPU core.
        for layer in tqdm(layers, "SoMA", unit="layer", leave=False, disable=None):
            _split_off_minor(layer, self.rank)


@torch.no_grad()
def _split_off_minor(layer: nn.Module, rank: int) -> None:
    """Writes B, A and W_res into one of peft's layers; the meta device has no values to write."""
    weight = cast(nn.Linear, layer.get_submodule("base_layer")).weight
    if weight.is_meta:
        return
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # the largest values are first
    root = s[-rank:].sqrt()
    b, a = u[:, -rank:] * root, root[:, None] * vh[-rank:]
    layer.get_parameter("lora_B.default.weight").copy_(b)
    layer.get_parameter("lora_A.default.weight").copy_(a)
    weight -= b @ a


@TUNING_REGISTRY.register()
def soma(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD soma``."""
    return SoMA(cfg.TUNING.SOMA.RANK)
