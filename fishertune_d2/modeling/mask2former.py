"""Mask2Former's head, built from transformers' bricks, as a Detectron2 segmentation head.

Shapes:
    B: images in the batch; Q: queries; C: classes; P: predictions made (DEC_LAYERS)
    H, W: the padded images, in pixels; h, w: the map at stride 4
"""

import copy
from collections.abc import Sequence
from functools import reduce

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerTransformerModule,
)

from fishertune_d2.compat import without_autocast, without_waiting_for_constants
from fishertune_d2.modeling.mask2former_criterion import Mask2FormerCriterion
from fishertune_d2.modeling.mask2former_init import init_pixel_decoder, init_transformer
from fishertune_d2.modeling.targets import SegmentationTargets, present_classes, semantic_masks

# transformers' names of the losses -> those of Mask2Former on Detectron2
LOSS_NAMES = {
    "loss_cross_entropy": "loss_ce",
    "loss_mask": "loss_mask",
    "loss_dice": "loss_dice",
}
FEATURE_STRIDES = [4, 8, 16, 32]
_MIN_SCORE = 1e-6  # makes all classes equally likely where every query says "no object"


@SEM_SEG_HEADS_REGISTRY.register()
class Mask2FormerHead(nn.Module):
    """Pixel decoder, masked-attention decoder and losses of Mask2Former.

    It reads four maps at strides 4, 8, 16 and 32, with any number of channels.
    """

    stride: float = FEATURE_STRIDES[0]  # of the masks, in pixels

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        config: Mask2FormerConfig,
        loss_weight: float = 1.0,
    ):
        """Builds the head with the initialisation of the published Mask2Former.

        Args:
            input_shape: channels and stride of each feature map that is used.
            config: transformers' configuration. ``num_labels`` is C, ``decoder_layers`` is P, and
                ``dropout`` applies to the pixel decoder only, as in the published code. A value
                that does not fit the architecture raises a ValueError.
            loss_weight: a factor of all losses. The matching does not depend on it.
        """
        super().__init__()
        names = sorted(input_shape, key=lambda name: input_shape[name].stride)
        _check(config, [input_shape[name].stride for name in names])
        assert config.num_labels is not None  # transformers annotates it as optional
        self.in_features = names
        self.num_classes = config.num_labels
        self.ignore_value: int = config.ignore_value
        self.num_queries = config.num_queries
        self.deep_supervision = config.use_auxiliary_loss
        self.loss_weights = {
            "loss_cross_entropy": loss_weight * config.class_weight,
            "loss_mask": loss_weight * config.mask_weight,
            "loss_dice": loss_weight * config.dice_weight,
        }

        channels = [input_shape[name].channels for name in names]
        self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=channels)
        self.transformer = Mask2FormerTransformerModule(config.feature_size, decoder_config(config))
        self.class_predictor: nn.Module = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.criterion = Mask2FormerCriterion(config, self.loss_weights)
        self.dropout = config.dropout
        init_pixel_decoder(self.pixel_decoder)
        init_transformer(self.transformer)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Reads MODEL.SEM_SEG_HEAD and MODEL.MASK_FORMER."""
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "loss_weight": float(head.LOSS_WEIGHT),
            "config": Mask2FormerConfig(
                num_labels=head.NUM_CLASSES,  # type: ignore[call-arg]  # of PretrainedConfig
                ignore_value=head.IGNORE_VALUE,
                feature_size=head.CONVS_DIM,
                mask_feature_size=head.MASK_DIM,
                encoder_layers=head.TRANSFORMER_ENC_LAYERS,
                encoder_feedforward_dim=head.TRANSFORMER_ENC_DIM_FEEDFORWARD,
                hidden_dim=former.HIDDEN_DIM,
                num_attention_heads=former.NHEADS,
                num_queries=former.NUM_OBJECT_QUERIES,
                decoder_layers=former.DEC_LAYERS,
                dim_feedforward=former.DIM_FEEDFORWARD,
                dropout=former.DROPOUT,
                pre_norm=former.PRE_NORM,
                use_auxiliary_loss=former.DEEP_SUPERVISION,
                no_object_weight=float(former.NO_OBJECT_WEIGHT),
                class_weight=float(former.CLASS_WEIGHT),
                mask_weight=float(former.MASK_WEIGHT),
                dice_weight=float(former.DICE_WEIGHT),
                train_num_points=former.TRAIN_NUM_POINTS,
                oversample_ratio=float(former.OVERSAMPLE_RATIO),
                importance_sample_ratio=float(former.IMPORTANCE_SAMPLE_RATIO),
            ),
        }

    def train(self, mode: bool = True) -> "Mask2FormerHead":
        """Sets the mode, except in the pixel decoder's layers if they have no dropout."""
        super().train(mode)
        # In training mode each of these layers looks for infinities, and the host waits for a GPU.
        # Nothing else in them depends on the mode, and `losses` refuses values that are not finite.
        if not self.dropout:
            self.pixel_decoder.encoder.layers.eval()
        return self

    def forward(
        self,
        features: dict[str, torch.Tensor],
        targets: torch.Tensor | SegmentationTargets | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Computes the losses, or without targets the scores; see `SegmentationHead`.

        Args:
            features: maps (B, channels, H / stride, W / stride) by name.
            targets: `SegmentationTargets`, or only the class of each pixel, (B, H, W) of any
                integer type, with `ignore_value` where there is none; then the host waits for a
                GPU.
            image_size: (H, W) of the scores. The mask logits are resized before the sigmoid, as in
                the published code. None leaves them at the size of the stride-4 map.

        Returns:
            (None, the result of `losses`), or (that of `semantic_scores`, {}).
        """
        predictions = self.predict(features)
        if targets is None:
            return semantic_scores(*predictions[-1], image_size), {}
        return None, self.losses(predictions, targets)

    def predict(self, features: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Predicts a class and a mask for each query, after each decoder layer.

        Args:
            features: see `forward`.

        Returns:
            P pairs of class logits (B, Q, C + 1), the last one "no object", and mask logits
            (B, Q, h, w). The first pair depends on the queries alone, the last one is final.
        """
        return self.decode([features[name] for name in self.in_features])

    def decode(
        self, maps: Sequence[torch.Tensor], *text: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Computes the result of `predict` from the maps.

        Args:
            maps: (B, channels, H / stride, W / stride), from fine to coarse.
            text: nothing, or what both decoders of a subclass get besides.

        Returns:
            P pairs, see `predict`.
        """
        # As published, because the sampling positions of the deformable attention need float32.
        maps = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in maps]
        device = maps[0].device
        with without_autocast(device), without_waiting_for_constants(device):
            pixels = self.pixel_decoder(maps, *text)
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features, *text)
        return [
            (self.class_logits(queries.transpose(0, 1), masks, pixels.mask_features), masks)
            for queries, masks in zip(
                decoded.intermediate_hidden_states, decoded.masks_queries_logits, strict=True
            )
        ]

    def class_logits(
        self, queries: torch.Tensor, masks: torch.Tensor, mask_features: torch.Tensor
    ) -> torch.Tensor:
        """Classifies queries; heads with another classifier override it.

        Args:
            queries: (B, Q, hidden_dim), after a decoder layer and its norm.
            masks: their mask logits (B, Q, h, w).
            mask_features: (B, mask_feature_size, h, w), whose products with queries are the masks.

        Returns:
            Class logits (B, Q, C + 1).
        """
        return self.class_predictor(queries)

    def loss_of_image(
        self,
        predictions: list[tuple[torch.Tensor, torch.Tensor]],
        targets: SegmentationTargets,
        image: int,
    ) -> torch.Tensor:
        """Returns the sum of one image's weighted losses, as if it were a batch of its own; scalar.

        The losses of a batch are divided by counts and class weights of the whole batch, so they
        are no sum over images. Errors are those of `losses`.
        """
        self.criterion.across_processes = False
        try:
            own = self.of_image(predictions, image)
            return reduce(torch.add, self.losses(own, targets.of_image(image)).values())
        finally:
            self.criterion.across_processes = True

    def of_image(
        self, predictions: list[tuple[torch.Tensor, torch.Tensor]], image: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns the predictions for one image, as a batch of its own."""
        one = slice(image, image + 1)
        return [(classes[one], masks[one]) for classes, masks in predictions]

    def log_probabilities(
        self, predictions: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Returns (B, C, h, w) float32: the logarithm of each class's probability.

        Mask2Former has no normalised p(y | x). Its semantic scores, divided by their sum over
        classes, give one for each pixel.
        """
        scores = semantic_scores(*predictions[-1]) + _MIN_SCORE
        return scores.log() - scores.sum(1, keepdim=True).log()

    def loss_divisors(self, labels: Sequence[torch.Tensor]) -> dict[str, torch.Tensor | float]:
        """Returns the divisor of each loss; see `SegmentationHead`.

        ``loss_ce`` is divided by the sum of all queries' class weights, which is known before the
        matching; ``loss_mask`` and ``loss_dice`` by the number of masks per process, at least 1.
        """
        classes = present_classes(labels, self.num_classes, self.ignore_value)
        queries, nothing = self.num_queries, self.criterion.eos_coef
        matched = [min(len(of_image), queries) for of_image in classes]
        weight = sum(n + nothing * (queries - n) for n in matched)
        masks = self.criterion.get_num_masks(classes, next(self.parameters()).device)
        return {"loss_ce": weight, "loss_mask": masks, "loss_dice": masks}

    def losses(
        self,
        predictions: list[tuple[torch.Tensor, torch.Tensor]],
        targets: torch.Tensor | SegmentationTargets,
    ) -> dict[str, torch.Tensor]:
        """Matches each prediction with the targets and weights the losses.

        A target that is neither a class nor `ignore_value` raises a ValueError, and a prediction
        that is not finite a FloatingPointError.

        Args:
            predictions: the result of `predict`.
            targets: as in `forward`.

        Returns:
            ``loss_ce``, ``loss_mask`` and ``loss_dice`` of the final prediction, then (under deep
            supervision) the same of prediction k as ``loss_ce_k`` and so on, k = 0 .. P - 2. A
            batch without any label has mask losses of 0, connected to every parameter.
        """
        if not isinstance(targets, SegmentationTargets):
            classes = present_classes(list(targets), self.num_classes, self.ignore_value)
            targets = SegmentationTargets(targets, classes)
        masks, labels = semantic_masks(targets)
        supervised = {"": predictions[-1]}
        if self.deep_supervision:
            supervised |= {f"_{k}": pair for k, pair in enumerate(predictions[:-1])}
        # Half precision underflows in the losses and ties in the matcher.
        supervised = {k: (c.float(), m.float()) for k, (c, m) in supervised.items()}
        with without_autocast(targets.pixels.device):
            unweighted = self.criterion(supervised, masks, labels)
        return {
            LOSS_NAMES[name] + suffix: weight * losses[name]
            for suffix, losses in unweighted.items()
            for name, weight in self.loss_weights.items()
        }


def decoder_config(config: Mask2FormerConfig) -> Mask2FormerConfig:
    """Returns the configuration of the masked-attention decoder."""
    # transformers also skips whole decoder layers with probability `dropout`. The published
    # decoder skips no layer, and has no dropout inside its layers.
    config = copy.deepcopy(config)
    config.dropout = 0.0
    return config


def semantic_scores(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Sums over the queries q: p(class | q) * sigmoid(mask of q).

    Args:
        class_logits: (B, Q, C + 1), the last one "no object".
        mask_logits: (B, Q, h, w).
        size: (H, W), to which the mask logits are resized first; None for (h, w).

    Returns:
        (B, C, H, W) float32 scores from 0 to Q, which are not normalised.
    """
    mask_logits = mask_logits.float()
    if size is not None:
        mask_logits = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False)
    probabilities = class_logits.float().softmax(-1)[..., :-1]
    with without_autocast(mask_logits.device):  # bfloat16 products would have 8 bits
        return torch.einsum("bqc,bqhw->bchw", probabilities, mask_logits.sigmoid())


def _check(config: Mask2FormerConfig, strides: list[int]) -> None:
    if strides != FEATURE_STRIDES:
        raise ValueError(
            f"Mask2FormerHead needs features at strides {FEATURE_STRIDES}, got {strides}; "
            "see MODEL.SEM_SEG_HEAD.IN_FEATURES"
        )
    if config.feature_size % 32:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.CONVS_DIM = {config.feature_size} must be a multiple of 32, the "
            "groups of the pixel decoder's GroupNorm"
        )
    if config.hidden_dim % 4:
        raise ValueError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM = {config.hidden_dim} must be a multiple of 4, for the "
            "sine and cosine of two coordinates"
        )
    if config.no_object_weight <= 0:
        raise ValueError(
            f"MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = {config.no_object_weight} must be above 0: the "
            "classification loss of a batch without labels would be 0 / 0"
        )
