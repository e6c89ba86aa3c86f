"""Finds a VFM's public weights, gives them timm's names and the model's sizes, and loads them.

Shapes: D channels, p patch side in pixels, (h, w) grid of patches, P prefix tokens.
"""

import logging
from collections import Counter
from collections.abc import Callable
from math import isqrt
from pathlib import Path

import torch.nn.functional as F
from huggingface_hub import HfApi, try_to_load_from_cache
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resample_patch_embed
from timm.models import load_state_dict_from_hf
from torch import Tensor

from fishertune_d2.files import first_names

from .plain_vit import PlainViT
from .weight_files import StateDict, read_weights
from .weight_names import to_timm_names

GROUPS = {
    "patch_embed": ("patch_embed.",),
    "tokens": ("pos_embed", "cls_token", "reg_token"),
    "blocks": ("blocks.",),
    "norm": ("norm", "fc_norm"),
}
REMEDY = (
    "Set MODEL.VFM.WEIGHTS to a file for this VFM (as its authors publish it, or safetensors "
    "with timm's names, for example model.safetensors from https://huggingface.co/timm), or to "
    '"random" for untrained weights.'
)

logger = logging.getLogger(__name__)


def load_vfm_weights(
    vit: PlainViT,
    weights: str,
    patch_resize: str = "bicubic",
    fallback: Callable[[], Path] | None = None,
    source: str = "https://huggingface.co/timm",
) -> str:
    """Loads public weights into a ViT, all of them or none, and logs the tensors by group.

    If sizes differ, the patch kernel and the position embedding are resized. "bicubic" is plain
    bicubic interpolation, as in Rein: a kernel's sum, so the response to a uniform image, grows by
    (new p / old p)^2, 1.306 from 14 to 16. "pi" is timm's way: the pseudo-inverse keeps the
    response, and the position embedding is resized with antialiasing. SAM's relative positions are
    resized linearly, as its authors do in every forward pass.

    A missing file raises a FileNotFoundError. If ``weights`` is "" and no source can be reached,
    the error is a RuntimeError.

    Args:
        vit: a timm ViT without a head; changed in place.
        weights: a path, see ``read_weights``; "" for timm's hub and then ``fallback``; or
            "random", which keeps the initial values.
        patch_resize: "bicubic" or "pi".
        fallback: returns a file with timm's names; called when the hub fails.
        source: the page of the weights, for the message that none were found.

    Returns:
        The source of the weights: a path, a page of timm's hub, or "random".

    Raises:
        ValueError: if ``patch_resize`` is unknown, or the file cannot be read or does not fit.
    """
    if patch_resize not in ("bicubic", "pi"):
        raise ValueError(f"MODEL.VFM.PATCH_RESIZE is {patch_resize!r}; known are 'bicubic', 'pi'")
    name = vit.pretrained_cfg["architecture"]
    if weights == "random":
        if not next(vit.parameters()).is_meta:  # a model on meta is only counted
            logger.warning(f'{name} keeps its random initialisation (MODEL.VFM.WEIGHTS "random")')
        return weights
    state, found = _read(weights) if weights else _find(name, vit, fallback, source)
    state, ignored = to_timm_names(state, vit)
    state = require_numbers(state, f"{name} from {found}")
    _resize(state, vit, patch_resize)
    _load(vit, state, ignored, f"{name} from {found}")
    return found


def require_numbers(state: StateDict, title: str, remedy: str = REMEDY) -> StateDict:
    """Returns the tensors as float32, and refuses integers, NaN and infinity."""
    numbers: StateDict = {}
    for key, value in state.items():
        if not value.is_floating_point():
            raise ValueError(
                f"weights cannot be used: {title}. {key} holds {value.dtype}, as quantised models "
                f"do; a model needs floating-point weights. {remedy}"
            )
        numbers[key] = value.float()
        if not numbers[key].isfinite().all():
            raise ValueError(
                f"weights cannot be used: {key} holds NaN or infinity in {title}, as after a "
                f"training that diverged. {remedy}"
            )
    return numbers


def _read(path: str | Path) -> tuple[StateDict, str]:
    """Reads a file; if there is none, the error names the remedy."""
    try:
        return read_weights(str(path)), str(Path(path).expanduser())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {REMEDY}") from error


def _find(
    name: str, vit: PlainViT, fallback: Callable[[], Path] | None, source: str
) -> tuple[StateDict, str]:
    """Tries timm's hub, then the fallback."""
    sources = [("timm's hub", lambda: _from_hub(vit))]
    if fallback is not None:
        sources.append(("the fallback", lambda: _read(fallback())))
    failures = []
    for label, ask in sources:
        try:
            return ask()
        # The errors of a network depend on the client and its version (requests, httpx, pip).
        except Exception as error:
            failures.append(f"{label}: {type(error).__name__}: {error}")
            logger.warning(f"no weights from {failures[-1]}")
    reasons = "\n".join(f"- {failure}" for failure in failures)
    raise RuntimeError(
        f"no weights for {name}. Its authors publish them at {source}. {REMEDY}\nTried:\n{reasons}"
    )


def _from_hub(vit: PlainViT) -> tuple[StateDict, str]:
    """Downloads the weights from timm's hub, or reads them from its cache."""
    repo = vit.pretrained_cfg.get("hf_hub_id")
    if not repo:
        raise LookupError(f"timm has no weights for {vit.pretrained_cfg['architecture']}")
    page = f"https://huggingface.co/{repo}"
    cached = try_to_load_from_cache(repo, "model.safetensors")
    if isinstance(cached, str):
        return _read(cached)[0], page
    # A quick request first, because without a network the download retries for a minute.
    HfApi().model_info(repo, timeout=10)
    return load_state_dict_from_hf(repo), page


def _resize(state: StateDict, vit: PlainViT, patch_resize: str) -> None:
    """Resizes the patch kernel and the positions to the sizes in ``vit``, in place."""
    before = {key: tuple(value.shape) for key, value in state.items()}
    antialias = patch_resize == "pi"
    kernel = state.get("patch_embed.proj.weight")  # (D, 3, p, p)
    if not hasattr(vit, "patch_embed"):  # a ConvNeXt has no tensor whose size depends on images
        return
    size = vit.patch_embed.patch_size
    if kernel is not None and kernel.ndim == 4 and tuple(kernel.shape[-2:]) != tuple(size):
        if patch_resize == "pi":
            resized = resample_patch_embed(kernel, list(size))
        else:
            resized = F.interpolate(kernel, size=size, mode="bicubic", align_corners=False)
        state["patch_embed.proj.weight"] = resized
    embedding = state.get("pos_embed")
    if embedding is not None and embedding.ndim == 4:  # (1, h, w, D)
        grid = list(_grid(vit))
        state["pos_embed"] = resample_abs_pos_embed_nhwc(embedding, grid, antialias=antialias)
    elif embedding is not None and embedding.ndim == 3:  # (1, P + h*w, D)
        state["pos_embed"] = _resized_positions(embedding, vit, antialias)
    for key, value in vit.state_dict().items():
        if key.endswith(("rel_pos_h", "rel_pos_w")) and key in state:  # (2*h - 1, D of a head)
            state[key] = F.interpolate(state[key].T[None], len(value), mode="linear")[0].T
    for key, shape in before.items():
        if shape != tuple(state[key].shape):
            logger.info(f"{key} {shape} -> {tuple(state[key].shape)}")


def _resized_positions(embedding: Tensor, vit: PlainViT, antialias: bool) -> Tensor:
    """Resizes a position embedding (1, P + h*w, D); the first P entries stay as they are."""
    # SAM's class lacks this attribute, as it has no class token.
    prefix = 0 if getattr(vit, "no_embed_class", True) else vit.num_prefix_tokens
    patches = embedding.shape[1] - prefix
    side = isqrt(max(patches, 0))
    grid = _grid(vit)
    # VFMs are trained on square images. Another count fits as it is, or is refused as a mismatch.
    if side * side != patches or (side, side) == grid:
        return embedding
    return resample_abs_pos_embed(
        embedding,
        list(grid),
        old_size=[side, side],
        num_prefix_tokens=prefix,
        antialias=antialias,
    )


def _grid(vit: PlainViT) -> tuple[int, int]:
    """Returns the (h, w) patches for which a ViT stores positions."""
    grid = vit.patch_embed.grid_size
    assert grid is not None  # None only for timm's img_size None
    return grid


def _load(vit: PlainViT, state: StateDict, ignored: list[str], title: str) -> None:
    """Loads ``state`` if its names and shapes fit, and logs counts by group."""
    wanted = vit.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [
        f"{key} {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"weights do not fit: {title}. Missing: {first_names(missing, 8)}. Unexpected: "
            f"{first_names(unexpected, 8)}. Wrong shape: {first_names(misshapen, 8)}. {REMEDY} "
            "(A checkpoint of the whole segmentor belongs in MODEL.WEIGHTS.)"
        )
    vit.load_state_dict(state)
    logger.info(
        f"{title}: loaded {_by_group(list(wanted))}; missing 0; unexpected 0; "
        f"ignored {_by_group(ignored)}"
    )


def _by_group(names: list[str]) -> str:
    """Counts names by group, as in "174 (patch_embed 2, tokens 2, blocks 168, norm 2)"."""
    counts = Counter(
        next((g for g, starts in GROUPS.items() if name.startswith(starts)), name.split(".")[0])
        for name in names
    )
    groups = ", ".join(f"{group} {count}" for group, count in counts.items())
    return f"{len(names)} ({groups})" if names else "0"
