"""Rein (Wei et al., CVPR 2024): learned tokens refine the patches after every block.

The same tokens become the queries of the Mask2Former decoder, so that each token corresponds to one
query. Parameters have the names and layouts of the public code (``w1oves/Rein``).

Shapes: B images, n patches, D channels, L blocks, m tokens (as many as queries), r the rank, C the
channels of a query.
"""

from functools import partial
from math import sqrt

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from fishertune_d2.compat import without_autocast
from fishertune_d2.modeling.vfm import VFMBackbone

from .registry import TUNING_REGISTRY, AddingMethod, linear, uniform


class ReinTokens(nn.Module):
    """The tokens of all blocks, and the layers that the blocks share.

    Args:
        blocks: L.
        width: D.
        patch_size: side of a patch in pixels; the tokens' initial range depends on it.
        num_tokens: m.
        rank: r.
        query_width: C.
        like: a tensor of the backbone, for device and dtype.
    """

    def __init__(
        self,
        *,
        blocks: int,
        width: int,
        patch_size: int,
        num_tokens: int,
        rank: int,
        query_width: int,
        like: Tensor,
    ):
        super().__init__()
        bound = sqrt(6 / (3 * patch_size**2 + sqrt(width * rank)))
        self.learnable_tokens_a = uniform((blocks, num_tokens, rank), bound, like)
        self.learnable_tokens_b = uniform((blocks, rank, width), bound, like)
        self.mlp_token2feat = linear(width, width, like)
        self.mlp_delta_f = linear(width, width, like)
        self.scale = nn.Parameter(like.new_tensor(1e-3))
        self.transform = linear(width, query_width, like)
        self.merge = linear(3 * query_width, query_width, like)

    def tokens(self, block: int | slice) -> Tensor:
        """(m, D) of one block, or (L, m, D) of several."""
        return self.learnable_tokens_a[block] @ self.learnable_tokens_b[block]

    def change(self, patches: Tensor, block: int) -> Tensor:
        """The change of the patches, (..., D), after a block, without its factor ``scale``."""
        tokens = self.tokens(block)
        scores = F.linear(patches, tokens)
        return attend(patches, scores, tokens, self.mlp_token2feat, self.mlp_delta_f)

    def after_block(
        self, block: int, prefix: int, module: nn.Module, args: tuple, output: Tensor
    ) -> Tensor:
        """A forward hook: refines the patches; class token and registers stay unchanged."""
        # (B, prefix + n, D), or (B, h, w, D) without a prefix.
        patches = output[:, prefix:]
        refined = patches + (self.scale * self.change(patches, block)).to(patches.dtype)
        return torch.cat([output[:, :prefix], refined], dim=1)

    def queries(self) -> Tensor:
        """The decoder's query embeddings, (m, C), from maximum, mean and last of the blocks."""
        # In full precision, as the embedding that they replace.
        with without_autocast(self.scale.device):
            each = self.transform(self.tokens(slice(None)))
            # The order of the public code's weights: the three numbers of a channel side by side.
            joined = torch.stack([each.amax(0), each.mean(0), each[-1]], dim=-1)
            return self.merge(joined.flatten(1))


class LinkedQueries(nn.Module):
    """Replaces an ``nn.Embedding`` of which transformers reads ``weight``.

    It has no parameters of its own: it computes with those of the tokens and the projection.

    Args:
        tokens: the backbone's tokens.
        project: a layer after the query embeddings; None for the embeddings themselves.
    """

    def __init__(self, tokens: ReinTokens, project: nn.Linear | None = None):
        super().__init__()
        # As attributes they would be registered, saved and counted a second time. In a tuple they
        # are not, and a deep copy of the segmentor still refers to its own tokens.
        self._sources = (tokens, project)

    @property
    def weight(self) -> Tensor:
        """(m, C)."""
        tokens, project = self._sources
        queries = tokens.queries()
        if project is None:
            return queries
        with without_autocast(queries.device):
            return project(queries)


class Rein(AddingMethod):
    """Trains tokens and the layers that make changes and queries of them, in ``backbone.rein``.

    On a ViT-L with 100 tokens these are the 2,990,081 parameters that are published. The layer from
    query embeddings to query features is the head's (``querys2feat``, 65,792 more) and replaces the
    features that the head would learn. A warm-up would train queries that the tokens then replace,
    and the authors have none.

    Args:
        num_tokens: m, the head's number of queries.
        rank: r.
        query_width: C, the head's.
    """

    options = ("REIN",)
    name = "rein"
    # Tokens, and the factor on the change.
    undecayed = ("learnable_tokens", ".scale")
    takes_warmup = False
    no_merge = (
        "its change of a patch depends on the patch, so it cannot become a part of the backbone's "
        "weights"
    )
    module: type[ReinTokens] = ReinTokens

    def __init__(self, *, num_tokens: int, rank: int, query_width: int):
        self.token_sizes = {"num_tokens": num_tokens, "rank": rank, "query_width": query_width}

    def build_module(self, backbone: VFMBackbone, head: nn.Module | None) -> ReinTokens:
        """Builds the tokens, and makes them the queries of the head, which must have queries."""
        # Without a head, to count only, ``transform`` and ``merge`` get no gradient.
        vit = backbone.vit
        tokens = self.module(
            blocks=len(vit.blocks),
            width=vit.embed_dim,
            patch_size=backbone.patch_size,
            like=next(vit.parameters()),
            **self.token_sizes,
        )
        if head is not None:
            link(tokens, head)
        for i, block in enumerate(vit.blocks):
            # A partial of a bound method, which a deep copy rebinds; it would share a closure.
            hook = partial(tokens.after_block, i, backbone.num_prefix_tokens)
            block.register_forward_hook(hook)
        return tokens


def attend(
    features: Tensor, scores: Tensor, tokens: Tensor, to_features: nn.Linear, to_change: nn.Linear
) -> Tensor:
    """Adds to each feature its attended tokens, and projects the sum.

    Args:
        features: (..., D).
        scores: (..., m), of each feature with each token.
        tokens: (m, D). The first takes a share of the attention and adds nothing.
        to_features: D to D, applied to the tokens.
        to_change: D to D, applied to the sum.

    Returns:
        (..., D).
    """
    attention = torch.softmax(scores / sqrt(tokens.shape[-1]), dim=-1)
    return to_change(attention[..., 1:] @ to_features(tokens[1:]) + features)


def link(tokens: ReinTokens, head: nn.Module) -> None:
    """Replaces a Mask2Former head's learned queries and their features by functions of the tokens.

    Args:
        tokens: the backbone's tokens.
        head: gets a layer ``querys2feat``.

    Raises:
        ValueError: if the head has no learned queries.
    """
    learned = getattr(getattr(head, "transformer", None), "queries_features", None)
    if learned is None:
        raise ValueError(
            f"{type(head).__name__} has no learned queries that tokens could replace: set "
            "MODEL.SEM_SEG_HEAD.NAME to Mask2FormerHead"
        )
    width = learned.weight.shape[1]
    head.querys2feat = linear(width, width, learned.weight)
    head.transformer.queries_embedder = LinkedQueries(tokens)
    head.transformer.queries_features = LinkedQueries(tokens, head.querys2feat)


@TUNING_REGISTRY.register()
def rein(cfg: CfgNode) -> Rein:
    """``TUNING.METHOD rein``: as many tokens as the head has queries."""
    return Rein(**token_options(cfg))


def token_options(cfg: CfgNode) -> dict[str, int]:
    """Reads the arguments of :class:`Rein` from cfg."""
    return {
        "num_tokens": cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES,
        "rank": cfg.TUNING.REIN.RANK,
        "query_width": cfg.MODEL.MASK_FORMER.HIDDEN_DIM,
    }
