"""The candidates: the weights of a backbone that may be tuned (Eq. 3).

In every transformer block these are the query, key and value projections of attention and the
linear layers of the feed-forward network, weights and biases. The attention's output projection,
the norms, LayerScale and the embeddings are no candidates. A group is one kind in one block.

A block of a ConvNeXt has no attention. Its two pointwise layers, which widen the channels and
narrow them again, are its feed-forward network (ours: the paper tunes ViTs alone). Its depthwise
convolution, its norm and its LayerScale are no candidates, and neither are the stem and the layers
between the stages.

A candidate is a slice of rows of a parameter, because many models fuse the three projections into
one matrix. Names follow timm (``blocks.<i>.attn.*``, ``blocks.<i>.mlp.*``), with any prefix. If a
model has stages (``stages.<s>.blocks.<i>``), its blocks are counted through all of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

KINDS = ("Q", "K", "V", "FFN")

_BLOCK_PARAMETER = re.compile(r"(?:^|\.)blocks\.(\d+)\.(attn|mlp)\.(.+)$")
_STAGE = re.compile(r"(?:^|.*\.)stages\.(\d+)\.$")  # the path before a block's name
# timm's names of separate projections; the last two are EVA's biases beside a fused matrix.
_SEPARATE = {"q_proj": "Q", "k_proj": "K", "v_proj": "V", "q_bias": "Q", "v_bias": "V"}


@dataclass(frozen=True, eq=False)
class Candidate:
    """Rows of one parameter that belong to one group.

    Attributes:
        name: the parameter's name in the model that was searched.
        kind: ``"Q"``, ``"K"``, ``"V"`` or ``"FFN"``.
        block: index of the block, from 0; it runs over all stages.
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
        model: a ViT or a ConvNeXt with timm's names, or any model that contains one. In a ConvNeXt
            the candidates are the pointwise layers of each block, as kind FFN. The model may be on
            the meta device, because values are not read.

    Returns:
        The candidates in the order of ``model.named_parameters()``. They do not overlap.

    Raises:
        ValueError: if ``model`` has no such block, or a fused projection does not split in three.
    """
    found: list[Candidate] = []
    parameters = dict(model.named_parameters())
    groups = groups_of({name: tuple(p.shape) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        for kind, block, rows in groups[name]:
            numel = parameter[rows].numel()
            found.append(Candidate(name, kind, block, parameter, rows, numel))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no parameter named blocks.<i>.attn.* or blocks.<i>.mlp.*: "
            "pass a timm ViT or ConvNeXt, or a model that contains one"
        )
    return found


def groups_of(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, list[tuple[str, int, slice]]]:
    """Finds the groups in each parameter.

    Args:
        shapes: the shape of each parameter, by name. If there are stages, all candidates of the
            model must be among them, because its blocks are counted through all stages.

    Returns:
        By the parameters' names the kind, the block and the rows of each group; empty lists for
        parameters that are no candidates.
    """
    matches = {name: match for name in shapes if (match := _BLOCK_PARAMETER.search(name))}
    depths: dict[str, int] = {}  # the number of blocks, by the path before their names
    for match in matches.values():
        path = _path_before(match)
        depths[path] = max(depths.get(path, 0), int(match[1]) + 1)
    groups: dict[str, list[tuple[str, int, slice]]] = {name: [] for name in shapes}
    for name, match in matches.items():
        groups[name] = _groups_in(name, match, shapes[name], _blocks_before(match, depths))
    return groups


def block_path(name: str) -> str:
    """The path of the block that a candidate's name lies in, such as ``blocks.3``."""
    match = _BLOCK_PARAMETER.search(name)
    assert match is not None  # callers pass names of candidates
    return name[: match.end(1)]


def _path_before(match: re.Match) -> str:
    """The path of the module that holds a parameter's block, with a dot behind it."""
    return match.string[: match.start(1) - len("blocks.")]


def _blocks_before(match: re.Match, depths: Mapping[str, int]) -> int:
    """The number of blocks in the stages before the one that a parameter lies in."""
    path = _path_before(match)
    stage = _STAGE.fullmatch(path)
    if stage is None:
        return 0
    others = (f"{path[: stage.start(1)]}{i}." for i in range(int(stage[1])))
    return sum(depths.get(other, 0) for other in others)


def _groups_in(
    name: str, match: re.Match, shape: tuple[int, ...], first: int
) -> list[tuple[str, int, slice]]:
    """Each group in one parameter, whose stage begins with the block ``first``."""
    if not shape:
        return []
    total = shape[0]
    block, part, layer = first + int(match[1]), match[2], match[3].split(".")[0]
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
