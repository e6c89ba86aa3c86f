"""The candidates: the weights of a ViT that may be tuned (Eq. 3).

In every transformer block these are the query, key and value projections of attention and the
linear layers of the feed-forward network, weights and biases. The attention's output projection,
the norms, LayerScale and the embeddings are no candidates. A group is one kind in one block.

A candidate is a slice of rows of a parameter, because many models fuse the three projections into
one matrix. Names follow timm (``blocks.<i>.attn.*``, ``blocks.<i>.mlp.*``), with any prefix.
"""

import re
from dataclasses import dataclass

from torch import nn

KINDS = ("Q", "K", "V", "FFN")

_BLOCK_PARAMETER = re.compile(r"(?:^|\.)blocks\.(\d+)\.(attn|mlp)\.(.+)$")
# timm's names of separate projections; the last two are EVA's biases beside a fused matrix.
_SEPARATE = {"q_proj": "Q", "k_proj": "K", "v_proj": "V", "q_bias": "Q", "v_bias": "V"}


@dataclass(frozen=True, eq=False)
class Candidate:
    """Rows of one parameter that belong to one group.

    Attributes:
        name: the parameter's name in the model that was searched.
        kind: ``"Q"``, ``"K"``, ``"V"`` or ``"FFN"``.
        block: index of the transformer block, from 0.
        parameter: the whole parameter, of shape (out, in) or (out,).
        rows: the rows (first dimension) that belong to this candidate.
        numel: the number of weights in these rows.
    """

    name: str
    kind: str
    block: int
    parameter: nn.Parameter
    rows: slice
    numel: int


def find_candidates(model: nn.Module) -> list[Candidate]:
    """Finds the Q, K, V and FFN weights of every block (Eq. 3).

    Args:
        model: a ViT with timm's names, or any model that contains one. It may be on the meta
            device, because values are not read.

    Returns:
        The candidates in the order of ``model.named_parameters()``. They do not overlap.

    Raises:
        ValueError: if ``model`` has no such block, or a fused projection does not split in three.
    """
    found: list[Candidate] = []
    for name, parameter in model.named_parameters():
        for kind, block, rows in groups_of(name, tuple(parameter.shape)):
            numel = parameter[rows].numel()
            found.append(Candidate(name, kind, block, parameter, rows, numel))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no parameter named blocks.<i>.attn.* or blocks.<i>.mlp.*: "
            "pass a timm ViT, or a model that contains one"
        )
    return found


def groups_of(name: str, shape: tuple[int, ...]) -> list[tuple[str, int, slice]]:
    """Each group (kind, block) in a parameter, with its rows; maybe none."""
    match = _BLOCK_PARAMETER.search(name)
    if match is None or not shape:
        return []
    total = shape[0]
    block, part, layer = int(match[1]), match[2], match[3].split(".")[0]
    if part == "mlp":
        # Not the norm that EVA-02 and others put between the two layers.
        return [("FFN", block, slice(0, total))] if layer.startswith("fc") else []
    if layer == "qkv":
        if total % 3:
            raise ValueError(f"{name} has {total} rows, which do not split into q, k and v")
        size = total // 3
        return [(kind, block, slice(i * size, (i + 1) * size)) for i, kind in enumerate("QKV")]
    if layer in _SEPARATE:
        return [(_SEPARATE[layer], block, slice(0, total))]
    return []
