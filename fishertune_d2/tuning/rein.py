"""Rein (Wei et al., CVPR 2024): learned tokens refine the patches after every block.

The same tokens become the queries of the Mask2Former decoder, so each stands for what one query
looks for. Parameters have the names and layouts of the public code (``w1oves/Rein``).

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

from .registry import TUNING_REGISTRY, TuningMethod


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
        """What is added to the patches after a block, but for its factor ``scale``.

        Args:
            patches: (..., D); each is treated by itself.
            block: its index.

        Returns:
            (..., D).
        """
        tokens = self.tokens(block)
        scores = F.linear(patches, tokens)
        return attend(patches, scores, tokens, self.mlp_token2feat, self.mlp_delta_f)

    def after_block(
        self, block: int, prefix: int, module: nn.Module, args: tuple, output: Tensor
    ) -> Tensor:
        """A forward hook: refines the patches; class token and registers stay as they are.

        Args:
            block: its index.
            prefix: how many tokens precede the patches.
            module: the block.
            args: what went into it.
            output: what came out, (B, prefix + n, D), or (B, h, w, D) without a prefix.

        Returns:
            What the next block, and the pyramid, get instead.
        """
        patches = output[:, prefix:]
        refined = patches + (self.scale * self.change(patches, block)).to(patches.dtype)
        return torch.cat([output[:, :prefix], refined], dim=1)

    def queries(self) -> Tensor:
        """The decoder's query embeddings, (m, C): maximum and mean over the blocks, and the last.

        In full precision, as the embedding that they replace.
        """
        with without_autocast(self.scale.device):
            each = self.transform(self.tokens(slice(None)))
            # The order of the public code's weights: the three numbers of a channel in a row.
            joined = torch.stack([each.amax(0), each.mean(0), each[-1]], dim=-1)
            return self.merge(joined.flatten(1))


class LinkedQueries(nn.Module):
    """Stands in for an ``nn.Embedding`` of which transformers reads ``weight``.

    It has no parameters: those that it computes with stay where they are registered.

    Args:
        tokens: of the backbone.
        project: from query embeddings to what is returned; None returns them as they are.
    """

    def __init__(self, tokens: ReinTokens, project: nn.Linear | None = None):
        super().__init__()
        # As attributes they would be registered, and saved and counted, a second time. Inside a
        # tuple they are not, and a deep copy of the segmentor still leads to its own tokens.
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


class Rein(TuningMethod):
    """Trains tokens, and what turns them into changes and queries; the backbone stays frozen.

    On a ViT-L with 100 tokens these are the 2,990,081 parameters that are published. The layer from
    query embeddings to query features is the head's (``querys2feat``, 65,792 more) and takes the
    place of the features that the head would learn.

    Args:
        num_tokens: m, and how many queries the head has from then on.
        rank: r.
        query_width: C, the head's.
    """

    options = ("REIN",)
    adds = True
    # Where the tokens are in the backbone, and what they are.
    name = "rein"
    module = ReinTokens

    def __init__(self, *, num_tokens: int, rank: int, query_width: int):
        self.token_sizes = {"num_tokens": num_tokens, "rank": rank, "query_width": query_width}

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Adds the tokens to the backbone, and makes them the queries of the head.

        The queries that the head has learned until then, as in a warm-up, are dropped.

        Args:
            backbone: a ``VFMBackbone``.
            head: a ``Mask2FormerHead``. None to count only: ``transform`` and ``merge`` are without
                use then, and would get no gradient.

        Raises:
            ValueError: if the head has no queries to replace.
        """
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
        setattr(backbone, self.name, tokens)
        for i, block in enumerate(vit.blocks):
            # A partial of a bound method, which a deep copy rebinds; it would share a closure.
            hook = partial(tokens.after_block, i, backbone.num_prefix_tokens)
            block.register_forward_hook(hook)

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """What was added to the backbone."""
        added = getattr(backbone, self.name)
        return {f"{self.name}.{name}": p for name, p in added.named_parameters()}

    def merge(self, backbone: nn.Module) -> None:
        """Impossible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"what TUNING.METHOD {self.name} adds to a patch depends on the patch, so it cannot "
            "become part of the backbone's weights: what to export is the checkpoint itself"
        )


def attend(
    features: Tensor, scores: Tensor, tokens: Tensor, to_features: nn.Linear, to_change: nn.Linear
) -> Tensor:
    """Features with what the tokens say about them, projected.

    Args:
        features: (..., D).
        scores: (..., m), of each feature with each token.
        tokens: (m, D). The first is attended to and says nothing.
        to_features: D to D, from tokens.
        to_change: D to D, of the result.

    Returns:
        (..., D).
    """
    attention = torch.softmax(scores / sqrt(tokens.shape[-1]), dim=-1)
    return to_change(attention[..., 1:] @ to_features(tokens[1:]) + features)


def link(tokens: ReinTokens, head: nn.Module) -> None:
    """Replaces a Mask2Former head's learned queries and their features by functions of the tokens.

    Args:
        tokens: of the backbone.
        head: gets a layer ``querys2feat``.

    Raises:
        ValueError: if the head has no learned queries.
    """
    learned = getattr(getattr(head, "transformer", None), "queries_embedder", None)
    if learned is None:
        raise ValueError(
            f"{type(head).__name__} has no learned queries that tokens could replace: set "
            "MODEL.SEM_SEG_HEAD.NAME to Mask2FormerHead"
        )
    width = learned.weight.shape[1]
    head.querys2feat = linear(width, width, learned.weight)
    head.transformer.queries_embedder = LinkedQueries(tokens)
    head.transformer.queries_features = LinkedQueries(tokens, head.querys2feat)


def uniform(shape: tuple[int, ...], bound: float, like: Tensor) -> nn.Parameter:
    """A parameter of numbers between ``-bound`` and ``bound``, of a tensor's device and dtype."""
    return nn.Parameter(like.new_empty(shape).uniform_(-bound, bound))


def linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    """A layer with PyTorch's initialisation (also the published one), made as :func:`uniform`'s."""
    return nn.Linear(inputs, outputs, device=like.device, dtype=like.dtype)


@TUNING_REGISTRY.register()
def rein(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD rein``: as many tokens as the head has queries."""
    return Rein(**token_options(cfg))


def token_options(cfg: CfgNode) -> dict[str, int]:
    """What cfg says of the tokens: the arguments of :class:`Rein`."""
    return {
        "num_tokens": cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES,
        "rank": cfg.TUNING.REIN.RANK,
        "query_width": cfg.MODEL.MASK_FORMER.HIDDEN_DIM,
    }
