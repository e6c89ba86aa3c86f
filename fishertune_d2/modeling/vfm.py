"""Vision foundation models (VFMs) of timm, plain ViTs and ConvNeXts, as a Detectron2 backbone.

Shapes: B images, D channels, N tokens (prefix tokens, then h*w patches), (H, W) pixels, E channels
of CLIP's image embedding.
"""

import copy
from collections.abc import Callable, Sequence
from typing import cast

import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from fishertune_d2.fisher.perturb import thirds_of_depth

from .plain_vit import PlainViT
from .public_weights import load_vfm_weights
from .pyramid import STRIDES
from .vfm_table import VFM, VFMS

__all__ = ["VFM", "VFMS", "VFMBackbone"]

# The parameters of timm's ViTs behind their last block, whose output is the last map.
FINAL_NORMS = ("norm.", "fc_norm.")
# The maps of the pyramid, in MODEL.VFM.OUT_FEATURES; those of the same blocks as they are; and
# CLIP's embedding of the image, of its patches, and of the image before any tuning.
PYRAMID = ("res2", "res3", "res4", "res5")
BLOCKS = ("block2", "block3", "block4", "block5")
CLIP = ("clip_global", "clip_dense", "clip_global_frozen")


@BACKBONE_REGISTRY.register()
class VFMBackbone(Backbone):
    """A plain ViT, whose outputs of four blocks form a pyramid, or a ConvNeXt of four stages.

    The maps are the raw outputs of the blocks or stages. A ViT's final norm belongs to the model
    and its parameter count, but the forward pass uses it only for CLIP's embeddings.

    Attributes:
        vit: the timm model; a ConvNeXt has this name too, so that all checkpoints have one layout.
        family: how the parts of the model are read.
        timm_args: the arguments of ``timm.create_model``, beside the name, that build it again.
        weights: the source of its public weights, see ``load_vfm_weights``.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        weights: str,
        img_size: Sequence[int],
        patch_size: int,
        patch_resize: str = "bicubic",
        checkpoint_blocks: bool = False,
        out_features: Sequence[str] = PYRAMID,
    ):
        """Builds the model and loads its public weights, from which Fisher tuning starts.

        Args:
            name: a key of ``VFMS``.
            weights: see ``load_vfm_weights``.
            img_size: (H, W) in pixels, for which the position embedding is stored. A ConvNeXt has
                none.
            patch_size: side of a patch in pixels; 0 for the size in the VFM's training. A ConvNeXt
                keeps its own strides.
            patch_resize: "bicubic" or "pi", see ``load_vfm_weights``.
            checkpoint_blocks: save memory by computing the blocks again in the backward pass.
            out_features: which of the features that `forward` describes it computes.

        Raises:
            ValueError: if ``name`` is no VFM, a size is not positive, or the VFM lacks a feature.
        """
        super().__init__()
        if name not in VFMS:
            raise ValueError(f"MODEL.VFM.NAME is {name!r}; known are {', '.join(VFMS)}")
        if patch_size < 0 or len(img_size) != 2 or min(img_size) < 1:
            raise ValueError(
                f"MODEL.VFM.PATCH_SIZE {patch_size} must be 0 or positive, and "
                f"MODEL.VFM.IMG_SIZE {tuple(img_size)} a positive height and width"
            )
        vfm = VFMS[name]
        _check_features(out_features, name)
        self.out_features = tuple(out_features)
        clip = not set(CLIP).isdisjoint(out_features)
        self.clip_dim = vfm.clip_dim if clip else 0
        self.family = vfm.family
        self.patch_size = self.family.patch_size(patch_size, vfm.patch_size)
        self.timm_args = {**self.family.timm_args(img_size, self.patch_size), **vfm.options}
        vit = timm.create_model(vfm.timm_name, num_classes=self.clip_dim, **self.timm_args)
        self.vit = cast(PlainViT, vit)
        for part in vfm.without:
            setattr(self.vit, part, nn.Identity())
        self.weights = load_vfm_weights(self.vit, weights, patch_resize, vfm.fallback, vfm.source)
        # In a list, so that it is no part of the model that is tuned, counted and saved.
        self._public = [copy.deepcopy(self.vit).eval()] if CLIP[2] in out_features else []
        self.vit.set_grad_checkpointing(checkpoint_blocks)
        self.taps = list(vfm.taps) or self.family.taps(self.vit)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        """Reads MODEL.VFM; Detectron2 passes ``input_shape`` to every backbone."""
        return {
            "name": cfg.MODEL.VFM.NAME,
            "weights": cfg.MODEL.VFM.WEIGHTS,
            "img_size": cfg.MODEL.VFM.IMG_SIZE,
            "patch_size": cfg.MODEL.VFM.PATCH_SIZE,
            "patch_resize": cfg.MODEL.VFM.PATCH_RESIZE,
            "checkpoint_blocks": cfg.MODEL.VFM.CHECKPOINT_BLOCKS,
            "out_features": cfg.MODEL.VFM.OUT_FEATURES,
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the features of ``out_features``.

        Args:
            images: (B, 3, H, W), normalised. If H or W is no multiple of the patch size, zeros (the
                mean colour) are appended at the bottom and the right. torch.onnx.export with
                dynamo=False raises a ValueError at a size other than ``img_size``.

        Returns:
            "res2", "res3", "res4", "res5": (B, D, ceil(H/s), ceil(W/s)) at s = 4, 8, 16, 32, which
            cover the images without the appended zeros. D is one number for a ViT, and one for each
            stage of a ConvNeXt.
            "block2" to "block5": the outputs of the same blocks or stages as they are, (B, D, h,
            w), which cover the appended zeros too. A ViT's have one cell a patch.
            "clip_global", "clip_dense": CLIP's embeddings of the image (B, E) and of its patches
            (B, E, h, w): the final norm and the head on all tokens; not normalised.
            "clip_global_frozen": "clip_global" of the public weights, without gradient; missing in
            evaluation mode without gradients.
        """
        size = images.shape[-2:]
        bottom, right = (-side % self.patch_size for side in size)
        images = F.pad(images, (0, right, 0, bottom))
        self.family.require_size(self.vit, images.shape[-2:])
        features = {}
        if self.clip_dim:
            tokens, maps = self.vit.forward_intermediates(images, indices=self.taps, norm=False)
            embedded = self.vit.head(tokens)
            patches = embedded[:, self.num_prefix_tokens :].transpose(1, 2)
            features["clip_global"] = embedded[:, 0]
            features["clip_dense"] = patches.unflatten(2, maps[0].shape[-2:])
        else:
            maps = self.vit.forward_intermediates(
                images, indices=self.taps, norm=False, intermediates_only=True
            )
        if not set(PYRAMID).isdisjoint(self.out_features):
            features |= self.family.pyramid(maps, self.patch_size, size)
        features |= dict(zip(BLOCKS, maps, strict=True))
        if self._public and (self.training or torch.is_grad_enabled()):
            features["clip_global_frozen"] = self._public_global(images)
        return {name: features[name] for name in self.out_features if name in features}

    @property
    def public_copy(self) -> nn.Module | None:
        """The model with the public weights, if "clip_global_frozen" is computed."""
        return next(iter(self._public), None)

    @torch.no_grad()
    def _public_global(self, images: Tensor) -> Tensor:
        """CLIP's embedding (B, E) of padded images by the public weights."""
        vit = cast(PlainViT, self.public_copy)
        return vit.head(vit.forward_features(images)[:, 0])

    def _apply(self, fn: Callable, recurse: bool = True) -> "VFMBackbone":
        """Moves the copy with the public weights, too, to a device or a dtype."""
        for vit in self._public:
            vit._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns the channels and the stride of each feature; an image's embedding has none."""
        channels, own = self.family.channels(self.vit), self.family.strides(self.patch_size)
        shapes = {
            name: ShapeSpec(channels=width, stride=stride)
            for names, strides in ((PYRAMID, STRIDES), (BLOCKS, own))
            for name, width, stride in zip(names, channels, strides, strict=True)
        }
        shapes |= {name: ShapeSpec(channels=self.clip_dim) for name in CLIP}
        shapes["clip_dense"] = ShapeSpec(channels=self.clip_dim, stride=self.patch_size)
        return {name: shapes[name] for name in self.out_features}

    @property
    def size_divisibility(self) -> int:
        """The patch size (or last stride) in pixels. Other sizes work; `forward` pads them."""
        return self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens (class, registers) before the patches; 0 for SAM and ConvNeXts."""
        return getattr(self.vit, "num_prefix_tokens", 0)

    @property
    def thirds(self) -> list[int]:
        """The indices of the blocks at 1/3, 1/2 and 2/3 of the depth, from 0."""
        return list(thirds_of_depth(len(self.family.blocks(self.vit))))

    @property
    def channels_first(self) -> bool:
        """Whether the perturbation points give maps (B, D, h, w)."""
        return self.family.channels_first

    def perturbation_points(self) -> list[nn.Module]:
        """Returns the modules whose output Eq. 6 perturbs.

        Returns:
            The patch embedding, with output (B, h, w, D) without prefix tokens, and the blocks at
            1/3, 1/2 and 2/3 of the depth, with output (B, N, D); SAM's blocks have (B, h, w, D). Of
            a ConvNeXt the stem and blocks at the same parts of its depth, with (B, D, h, w).
        """
        return self.family.perturbation_points(self.vit)

    def unused_parameters(self) -> set[str]:
        """Returns the names of the parameters that ``forward`` does not use.

        They are those of the final norm and the head, unless CLIP's embeddings are computed.
        """
        if not {"clip_global", "clip_dense"}.isdisjoint(self.out_features):
            return set()
        names = (name for name, _ in self.vit.named_parameters())
        return {f"vit.{name}" for name in names if name.startswith((*FINAL_NORMS, "head."))}


def _check_features(names: Sequence[str], vfm: str) -> None:
    unknown = [name for name in names if name not in PYRAMID + BLOCKS + CLIP]
    if unknown or not names:
        raise ValueError(
            f"MODEL.VFM.OUT_FEATURES is {list(names)}: choose from "
            f"{', '.join(PYRAMID + BLOCKS + CLIP)}"
        )
    if not VFMS[vfm].clip_dim and not set(CLIP).isdisjoint(names):
        able = [name for name, each in VFMS.items() if each.clip_dim]
        raise ValueError(
            f"MODEL.VFM.OUT_FEATURES {list(names)} asks for CLIP's embeddings, which "
            f"MODEL.VFM.NAME {vfm} does not have: {', '.join(able)} have them"
        )
