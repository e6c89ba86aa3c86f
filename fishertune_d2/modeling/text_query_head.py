"""tqdm's head: queries made of class names drive Mask2Former (Pak et al., ECCV 2024).

Shapes:
    B: images in the batch; C: classes, as many as queries; E: channels of CLIP's embeddings
    P: predictions made (DEC_LAYERS); h, w: patches
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from transformers import Mask2FormerConfig

from fishertune_d2.compat import without_autocast

from .class_prompts import ClassPrompts
from .mask2former import FEATURE_STRIDES, Mask2FormerHead, decoder_config
from .mask2former_criterion import Mask2FormerCriterion, Matches, Prediction, require_finite
from .mask2former_init import init_pixel_decoder, init_transformer
from .patch_neck import PatchNeck
from .targets import SegmentationTargets
from .text_decoders import TextPixelDecoder, TextQueryTransformer
from .text_losses import language_loss, vision_language_loss, vision_loss
from .text_refinement import TextRefinement
from .text_tower import TEXT_TOWERS, TextTower, class_names
from .vfm_table import VFMS

NEEDED = ("clip_global", "clip_dense")


class TextPredictions(list[Prediction]):
    """The pairs of `Mask2FormerHead.predict`, with what the regularisations compare.

    Attributes:
        text: the classes as the image refines them, (B, C, E).
        image: the embedding of the image, (B, E).
        patches: those of its patches, (B, E, h, w).
        public: ``image`` by the public weights, (B, E); None where the backbone computes none.
    """

    def __init__(
        self,
        pairs: Sequence[Prediction],
        text: Tensor,
        image: Tensor,
        patches: Tensor,
        public: Tensor | None,
    ):
        super().__init__(pairs)
        self.text, self.image, self.patches, self.public = text, image, patches, public


class FixedMatching(Mask2FormerCriterion):
    """Mask2Former's losses, where query c predicts class c or, in images without it, no object."""

    def match(
        self,
        predictions: dict[str, Prediction],
        masks: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> list[Matches]:
        """Returns the pairs of queries and masks, the same for each prediction.

        A prediction that is not finite raises a FloatingPointError that names it.
        """
        sums = torch.stack([logits.sum() for pair in predictions.values() for logits in pair])
        require_finite(list(predictions), sums)
        matches = [(label, torch.arange(len(label), device=label.device)) for label in labels]
        return [matches for _ in predictions]


@SEM_SEG_HEADS_REGISTRY.register()
class TextQueryHead(Mask2FormerHead):
    """Mask2Former whose queries are the names of the classes, and whose cells attend to them.

    Attributes:
        class_texts: the names of the classes, which a run records.
        prompts: learned tokens and the class names before a frozen text tower.
        gamma: the factor of each channel of the refinement, (E,).
        regularisation: the weights of "loss_language", "loss_vision" and "loss_vision_language".
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        config: Mask2FormerConfig,
        loss_weight: float = 1.0,
        *,
        tower: TextTower,
        classes: Sequence[str],
        context_tokens: int,
        regularisation: Mapping[str, float],
        norm: str,
    ):
        """Builds the head.

        A feature that the backbone lacks raises a ValueError.

        Args:
            input_shape: channels and stride of the backbone's four raw maps, and of ``NEEDED``.
            config: see `Mask2FormerHead`; its number of queries becomes C.
            loss_weight: a factor of all losses.
            tower: the text tower; E must be the channels of the backbone's embeddings.
            classes: the C names.
            context_tokens: learned tokens of a prompt.
            regularisation: the weights of the three losses, see the class; 0 leaves a loss out.
            norm: the norm in the neck, a name of Detectron2's ``get_norm``.
        """
        maps = [name for name in input_shape if not name.startswith("clip_")]
        _check(input_shape, maps, regularisation)
        channels = input_shape[maps[0]].channels
        # Detectron2 and transformers annotate these as optional.
        assert channels is not None and config.num_labels is not None
        config.num_queries = config.num_labels
        # The strides of the neck's maps, for patches of 16 pixels. With others they are nominal,
        # and the finest map has a quarter of a patch.
        pyramid = {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, stride in zip(maps, FEATURE_STRIDES, strict=True)
        }
        super().__init__(pyramid, config, loss_weight)
        self.stride = input_shape[maps[0]].stride / 4  # type: ignore[operator]  # of the masks
        self.class_texts = tuple(classes)
        self.loss_weight, self.regularisation = loss_weight, dict(regularisation)
        dim = tower.dim
        self.prompts = ClassPrompts(tower, classes, context_tokens)
        self.refinement = TextRefinement(dim, config.hidden_dim)
        self.gamma = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim)))
        self.neck = PatchNeck(channels, norm)
        self.pixel_decoder = TextPixelDecoder(config, [channels] * len(maps), dim)
        self.transformer = TextQueryTransformer(config.feature_size, decoder_config(config), dim)
        self.criterion = FixedMatching(config, self.loss_weights)
        init_pixel_decoder(self.pixel_decoder)
        init_transformer(self.transformer)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Reads MODEL.TEXT, and the keys that `Mask2FormerHead` reads; refuses two CLIP models."""
        text, head = cfg.MODEL.TEXT, cfg.MODEL.SEM_SEG_HEAD
        _require_one_clip(cfg.MODEL.VFM.NAME, text.NAME)
        dataset = next(iter(cfg.DATASETS.TRAIN), "")
        arguments = super().from_config(cfg, input_shape)
        clip = {name: s for name, s in input_shape.items() if name.startswith("clip_")}
        return arguments | {
            "input_shape": arguments["input_shape"] | clip,
            "tower": TextTower(text.NAME, text.WEIGHTS),
            "classes": class_names(text.CLASSES, dataset, head.NUM_CLASSES),
            "context_tokens": text.CONTEXT_TOKENS,
            "regularisation": {
                "loss_language": float(text.LANGUAGE_WEIGHT),
                "loss_vision": float(text.VISION_WEIGHT),
                "loss_vision_language": float(text.VISION_LANGUAGE_WEIGHT),
            },
            "norm": head.NORM,
        }

    def predict(self, features: dict[str, Tensor]) -> TextPredictions:
        """Predicts a class and a mask for each class's query, after each decoder layer.

        Args:
            features: the four raw maps (B, channels, h, w) and the embeddings of ``NEEDED``;
                "clip_global_frozen" for the loss on vision.

        Returns:
            P pairs as of `Mask2FormerHead.predict`, with the text and the embeddings.
        """
        image, patches = features["clip_global"], features["clip_dense"]
        text = self.refined_text(image, patches)
        maps = self.neck([features[name] for name in self.in_features])
        public = features.get("clip_global_frozen")
        return TextPredictions(self.decode(maps, text), text, image, patches, public)

    def refined_text(self, image: Tensor, patches: Tensor) -> Tensor:
        """Returns t + gamma * C(t, [image; patches]), (B, C, E), for the prompts' embeddings t.

        Args:
            image: (B, E).
            patches: (B, E, h, w).
        """
        text = self.prompts().expand(len(image), -1, -1)
        seen = torch.cat([image[:, None], patches.flatten(2).transpose(1, 2)], dim=1)
        return text + self.gamma * self.refinement(text, seen)

    def losses(
        self, predictions: list[Prediction], targets: Tensor | SegmentationTargets
    ) -> dict[str, Tensor]:
        """Adds the regularisations to the losses of `Mask2FormerHead`.

        Args:
            predictions: the result of `predict`.
            targets: as in `Mask2FormerHead.losses`.

        Returns:
            The losses of `Mask2FormerHead`, and those of ``regularisation`` with a weight.
        """
        assert isinstance(predictions, TextPredictions)
        losses = super().losses(predictions, targets)
        labels = targets.pixels if isinstance(targets, SegmentationTargets) else targets
        text, patches = predictions.text.float(), predictions.patches.float()
        with without_autocast(labels.device):
            anchors = self.prompts.anchors().float()
            found = {
                "loss_language": language_loss(text, anchors),
                "loss_vision_language": vision_language_loss(
                    patches, text, labels, self.ignore_value
                ),
            }
            if predictions.public is not None:
                public = predictions.public.float()
                found["loss_vision"] = vision_loss(predictions.image.float(), public)
        weights = self.regularisation
        return losses | {
            name: self.loss_weight * weights[name] * loss
            for name, loss in found.items()
            if weights[name]
        }

    def loss_divisors(self, labels: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Returns the divisor of each loss; the regularisations' are images or labelled pixels."""
        images = float(len(labels))
        labelled = sum(float((label != self.ignore_value).sum()) for label in labels)
        return super().loss_divisors(labels) | {
            "loss_language": images,
            "loss_vision": images,
            "loss_vision_language": max(labelled, 1.0),
        }

    def of_image(self, predictions: list[Prediction], image: int) -> TextPredictions:
        """Returns the predictions for one image, as a batch of its own, without ``public``.

        The Fisher information is measured on them. Eq. 6 shifts the backbone's features and not
        those of its public copy, so with ``public`` "loss_vision" would add this difference to the
        information about the labels of x', and nothing to that of x after a warm-up.
        """
        assert isinstance(predictions, TextPredictions)
        one = slice(image, image + 1)
        return TextPredictions(
            super().of_image(predictions, image),
            predictions.text[one],
            predictions.image[one],
            predictions.patches[one],
            public=None,
        )


def _check(
    shapes: Mapping[str, ShapeSpec], maps: Sequence[str], regularisation: Mapping[str, float]
) -> None:
    needed = [*NEEDED, *(["clip_global_frozen"] if regularisation["loss_vision"] else [])]
    missing = [name for name in needed if name not in shapes]
    if missing or len(maps) != len(FEATURE_STRIDES) or len({shapes[m].stride for m in maps}) != 1:
        raise ValueError(
            f"TextQueryHead needs four maps with one cell a patch and {', '.join(needed)}, and "
            f"gets {', '.join(shapes)}: set MODEL.SEM_SEG_HEAD.IN_FEATURES to ['block2', 'block3', "
            "'block4', 'block5'], and MODEL.VFM.OUT_FEATURES to these and the embeddings"
        )


def _require_one_clip(vfm: str, text: str) -> None:
    # Towers of two models may have embeddings of one width, which mean different things.
    if vfm != text:
        both = [name for name in TEXT_TOWERS if name in VFMS and VFMS[name].clip_dim]
        raise ValueError(
            f"MODEL.VFM.NAME {vfm} and MODEL.TEXT.NAME {text} are not the towers of one CLIP "
            f"model, so their embeddings cannot be compared: set both to one of {', '.join(both)}"
        )
