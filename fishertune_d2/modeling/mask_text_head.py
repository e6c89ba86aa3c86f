"""Mask2Former's head with the names of the classes as classifier, as in CLOUDS (CVPR 2024).

The logit of query q and class c is a learned scale times the cosine of two embeddings: one of the
pixels inside the query's mask and of the query itself, and CLIP's of the class's name.

Shapes:
    B: images in the batch; Q: queries; C: classes; S: names of all classes; T: templates
    D: width of the queries; M: channels of the mask features; E: channels of the text embeddings
    h, w: the map at stride 4
"""

from collections.abc import Sequence
from math import log

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import MLP
from transformers import Mask2FormerConfig

from fishertune_d2.compat import without_autocast

from .frozen import Frozen
from .mask2former import Mask2FormerHead
from .text_tower import TextTower, class_names

# The prompts of ViLD (Gu et al., ICLR 2022), over which embeddings are averaged.
TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(f"a photo of a {size} {{}}." for size in ("small", "medium", "large")),
    *(f"This is a photo of a {size} {{}}." for size in ("small", "medium", "large")),
    *(f"There is a {size} {{}} in the scene." for size in ("small", "medium", "large")),
)
# The start and the limit of the scale, CLIP's.
START_SCALE, MAX_SCALE = 1 / 0.07, 100.0


@SEM_SEG_HEADS_REGISTRY.register()
class MaskTextHead(Mask2FormerHead):
    """A Mask2Former head that compares masks with the names of the classes.

    The embeddings of the names are constants in the state dict, so that a checkpoint needs no
    weights of a text tower.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        config: Mask2FormerConfig,
        texts: Sequence[Tensor],
        loss_weight: float = 1.0,
        class_texts: Sequence[str] = (),
    ):
        """Builds the head; see `Mask2FormerHead` for the other arguments.

        Args:
            input_shape: channels and stride of each feature map that is used.
            config: transformers' configuration.
            texts: for each class the embeddings of its names, (n, E) of any length.
            loss_weight: a factor of all losses.
            class_texts: the C names that ``texts`` embeds, which a run records.

        Raises:
            ValueError: if there are not C classes.
        """
        super().__init__(input_shape=input_shape, config=config, loss_weight=loss_weight)
        if len(texts) != self.num_classes:
            raise ValueError(
                f"there are texts of {len(texts)} classes, and MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
                f"{self.num_classes}: give as many"
            )
        self.class_texts = tuple(class_texts)
        width, channels = config.hidden_dim, config.mask_feature_size
        self.class_predictor = MaskTextClassifier(texts, width, channels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Reads MODEL.SEM_SEG_HEAD, MODEL.MASK_FORMER and MODEL.TEXT."""
        text, train = cfg.MODEL.TEXT, cfg.DATASETS.TRAIN
        dataset = train[0] if train else ""
        names = class_names(text.CLASSES, dataset, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        tower = TextTower(text.NAME, text.WEIGHTS)
        texts = encode_classes(tower, names)
        return {**super().from_config(cfg, input_shape), "texts": texts, "class_texts": names}

    def class_logits(self, queries: Tensor, masks: Tensor, mask_features: Tensor) -> Tensor:
        """See `MaskTextClassifier.forward`."""
        return self.class_predictor(queries, masks, mask_features)


class TextEmbeddings(Frozen):
    """The embeddings of all names, (S, E), of length 1."""

    embeddings: Tensor

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.register_buffer("embeddings", embeddings)


class MaskTextClassifier(nn.Module):
    """Class logits exp(s) * cos(MLP(linear(LN(pooled)) + query), text).

    ``pooled`` is the mean of the mask features over the pixels where the query's mask logit is
    above 0. A class with several names has the largest of their cosines. "No object" has a learned
    embedding in place of a text.

    Args:
        texts: for each class (n, E).
        width: D.
        channels: M.

    Attributes:
        texts: the embeddings of the names, which are constants.
        counts: the number of names of each class.
        log_scale: s, a scalar; exp(s) is at most 100.
    """

    def __init__(self, texts: Sequence[Tensor], width: int, channels: int):
        super().__init__()
        self.counts = [len(names) for names in texts]
        self.texts = TextEmbeddings(F.normalize(torch.cat(list(texts)).detach(), dim=-1))
        dim = self.texts.embeddings.shape[1]
        self.pooled = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.embed = MLP(width, [width, width, dim])
        self.no_object = nn.Embedding(1, dim)
        self.log_scale = nn.Parameter(torch.tensor(log(START_SCALE)))

    def forward(self, queries: Tensor, masks: Tensor, mask_features: Tensor) -> Tensor:
        """Compares queries with texts.

        Args:
            queries: (B, Q, D).
            masks: mask logits (B, Q, h, w); no gradient flows through them.
            mask_features: (B, M, h, w).

        Returns:
            Logits (B, Q, C + 1) in float32, the last one "no object".
        """
        inside = pool_masks(mask_features, masks)
        embedded = self.embed(self.pooled(inside) + queries)
        with without_autocast(embedded.device):  # bfloat16 cannot tell logits of 100 apart
            embedded = F.normalize(embedded.float(), dim=-1)
            cosines = embedded @ self.texts.embeddings.float().mT
            best = [names.amax(-1) for names in cosines.split(self.counts, dim=-1)]
            nothing = embedded @ F.normalize(self.no_object.weight.float(), dim=-1).mT
            scale = self.log_scale.float().exp().clamp(max=MAX_SCALE)
            return scale * torch.cat([torch.stack(best, dim=-1), nothing], dim=-1)


def pool_masks(features: Tensor, masks: Tensor) -> Tensor:
    """Averages features (B, M, h, w) where mask logits (B, Q, h, w) are above 0.

    Returns:
        (B, Q, M); zeros for a mask without such a pixel.
    """
    with without_autocast(features.device):  # a sum over pixels overflows in half precision
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        inside = (masks > 0).to(wide.dtype)
        count = inside.sum((-2, -1)).clamp(min=1)
        return torch.einsum("bqhw,bmhw->bqm", inside, wide) / count[..., None]


@torch.no_grad()
def encode_classes(tower: TextTower, names: Sequence[str]) -> list[Tensor]:
    """Embeds the names of classes, each the mean over `TEMPLATES` of embeddings of length 1.

    Args:
        tower: CLIP's text tower.
        names: the name of each class; synonyms are separated by commas.

    Returns:
        For each class (n, E), an embedding of length 1 for each of its names.

    Raises:
        ValueError: if a class has no name.
    """
    synonyms = [[word.strip() for word in name.split(",") if word.strip()] for name in names]
    for name, words in zip(names, synonyms, strict=True):
        if not words:
            raise ValueError(
                f"MODEL.TEXT.CLASSES has a class of the name {name!r}: write one name for each "
                "class, or several that are separated by commas"
            )
    words = [word for of_class in synonyms for word in of_class]
    tokens = tower.tokenize([template.format(word) for word in words for template in TEMPLATES])
    ends = tower.ends(tokens)
    # A token sees only those before it, so the zeros behind the longest text can be left out.
    embedded = tower.embed(tokens[:, : int(ends.max()) + 1].to(tower.text.text_projection.device))
    encoded = F.normalize(tower.encode(embedded, ends.to(embedded.device)), dim=-1)  # (S * T, E)
    means = encoded.unflatten(0, (len(words), len(TEMPLATES))).mean(1)
    return list(F.normalize(means, dim=-1).split([len(of_class) for of_class in synonyms]))
