"""Finds the ViT in a model by its blocks, and the weights that are its own."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

from fishertune_d2.fisher import find_candidates
from fishertune_d2.modeling.vfm import VFMBackbone

# The attributes of a VFMBackbone that stages and methods read.
_ASKED_FOR = ("vit", "perturbation_points", "unused_parameters", "num_prefix_tokens")
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# The names that classes of ViTs give their own parts: embeddings, tokens, norms behind the blocks.
_OWN_PARTS = re.compile(
    r"(patch|pixel|time|type)_embed(s|dings?|\d+)?|embeds?|embeddings|rope"
    r"|(\w+_)?pos(ition|itional)?(_embed(s|dings?)?|_bias|_block)?(_\d+|_window)?"
    r"|(cls|class|reg|register|storage|dist|mask)_(tokens?|embed(ding)?)(_\d+)?"
    r"|(fc_|ln_|layer_?|final_|pre_|post_|scale\d_)?norm(_pre|_post|\d*)|ln_(pre|post|f)"
)
# The names that they give parts behind the blocks, some of which are built before the blocks.
_LATER_PARTS = re.compile(r"neck|fpn|head|decode|pyramid")


def find_vit(model: nn.Module, backbone: str | None = None) -> tuple[str, nn.Module]:
    """Finds the module with the blocks in the submodule ``backbone``, or one of another name.

    A backbone may wrap a ViT: Detectron2's FPN has it in ``bottom_up``, ViTDet's pyramid in
    ``net``, and ``VFMBackbone`` in ``vit``. If a backbone has stages with blocks of their own, the
    ViT is the module that holds all stages.

    Returns:
        The name of the ViT in ``model`` (one of its names if it has several), and the ViT.

    Raises:
        ValueError: if there is no such submodule, it has no blocks, or more than one ViT.
    """
    name = "backbone" if backbone is None else backbone
    try:
        outer = model.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in model.named_children())
        raise ValueError(
            f"{type(model).__name__} has no submodule {name!r}: pass backbone=, the name of one; "
            f"it has {children}{_elsewhere(model)}"
        ) from error
    try:
        paths = _paths_of_blocks(outer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}{_elsewhere(model)}") from error
    path = _common_path(outer, paths)
    if path is None:
        names = " and ".join(_joined(name, path) for path in paths)
        raise ValueError(
            f"{name} of {type(model).__name__} holds more than one module with blocks, {names}: "
            "pass backbone=, the name of the one whose weights are to be selected"
        )
    return _joined(name, path), outer.get_submodule(path)


def parameters_of_vit(vit: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a ViT by name, without those of a neck, decoder or head in its class."""
    # SAM's class, or BEiT's for detection, builds its neck beside its blocks. The ViT's own parts
    # are the blocks, embeddings, tokens and norms, recognised by their names, and the modules built
    # before the blocks, such as a stem. Every other part is a neck or a head.
    blocks = {candidate.name.partition(".")[0] for candidate in find_candidates(vit)}
    children = [name for name, _ in vit.named_children()]
    first = min(children.index(name) for name in blocks)
    own = blocks | {name for name in children[:first] if not _LATER_PARTS.search(name)}
    parts = ((name.partition(".")[0], name, p) for name, p in vit.named_parameters())
    return {name: p for part, name, p in parts if part in own or _OWN_PARTS.fullmatch(part)}


def count_parameters_around(model: nn.Module, path: str) -> Mapping[str, int]:
    """Counts the weights around the ViT ``path``, by child of the model or part of its class."""
    counts: Counter[str] = Counter()
    for name, parameter in _parameters_around(model, model.get_submodule(path)).items():
        inside = name.removeprefix(f"{path}.") if path else name
        part = inside.partition(".")[0]
        counts[part if inside == name else f"{path}.{part}"] += parameter.numel()
    return counts


def require_nothing_around(model: nn.Module) -> None:
    """Refuses a backbone with weights around its ViT, or without a ``VFMBackbone``'s methods."""
    # Stages and methods treat everything named ``backbone.`` as the ViT: a neck in it, which starts
    # from random weights, would stay frozen for the whole run.
    path, vit = find_vit(model)
    backbone = model.get_submodule("backbone")
    around = _parameters_around(backbone, vit)
    if isinstance(backbone, VFMBackbone):  # the head in its ViT is CLIP's, with public weights
        around = {name: p for name, p in around.items() if not name.startswith("vit.head.")}
    if around:
        count = sum(parameter.numel() for parameter in around.values())
        raise ValueError(
            f"the backbone {type(backbone).__name__} has {count:,} weights around its ViT "
            f"{path} ({next(iter(around))}, ...), which this trainer would not "
            "train: use apply_fishertune with a trainer of Detectron2 (docs/reuse.md), or "
            "MODEL.BACKBONE.NAME VFMBackbone, whose maps need no neck"
        )
    missing = [name for name in _ASKED_FOR if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no {', '.join(missing)}, which this "
            "trainer asks it for: use MODEL.BACKBONE.NAME VFMBackbone, or apply_fishertune with a "
            "trainer of Detectron2 (docs/reuse.md)"
        )


def _parameters_around(module: nn.Module, vit: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module, by name, without the ViT's own."""
    own = set(parameters_of_vit(vit).values())
    return {name: p for name, p in module.named_parameters() if p not in own}


def _paths_of_blocks(module: nn.Module) -> list[str]:
    """Names of the modules that have ``blocks`` with candidates, in order, each once."""
    names = (candidate.name for candidate in find_candidates(module))
    # The last "blocks.<i>.attn" or ".mlp" in a name is what makes it a candidate.
    paths = (re.split(r"(?:^|\.)blocks\.\d+\.(?:attn|mlp)\.", name)[0] for name in names)
    return list(dict.fromkeys(paths))


def _common_path(module: nn.Module, paths: list[str]) -> str | None:
    """The path of the ViT that holds all paths; None if several ViTs hold them."""
    if len(paths) == 1:
        return paths[0]
    if len({re.sub(r"\d+", "", path) for path in paths}) > 1:
        return None
    if all(hasattr(module.get_submodule(path), "patch_embed") for path in paths):
        return None
    parts = [path.split(".") for path in paths]
    shared = 0
    while len({tuple(part[: shared + 1]) for part in parts}) == 1:
        shared += 1
    common = parts[0][:shared]
    # The module that holds the list of stages, not the list.
    while isinstance(module.get_submodule(".".join(common)), _LISTS):
        common.pop()
    return ".".join(common)


def _elsewhere(model: nn.Module) -> str:
    try:
        paths = _paths_of_blocks(model)
    except ValueError:
        return ""
    return f"; a ViT's blocks are in {', '.join(path or 'the model itself' for path in paths)}"


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
