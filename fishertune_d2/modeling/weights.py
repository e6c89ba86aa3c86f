"""Finds a VFM's weights, brings them to timm's names and to the wanted sizes, and reports.

Shapes: D channels, p patch side in pixels, (h, w) grid of patches, P prefix tokens.
"""

import logging
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from math import isqrt
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, try_to_load_from_cache
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import load_state_dict, load_state_dict_from_hf
from torch import Tensor, nn

# In public files, but no part of an encoder: DINOv2's mask token, a classifier.
IGNORED = ("mask_token", "head.")
GROUPS = {
    "patch_embed": ("patch_embed.",),
    "tokens": ("pos_embed", "cls_token", "reg_token"),
    "blocks": ("blocks.",),
    "norm": ("norm", "fc_norm"),
}
REMEDY = (
    "Set MODEL.VFM.WEIGHTS to a file for this VFM (safetensors or pth, with the names of timm "
    "or of the authors; for example model.safetensors from https://huggingface.co/timm), or to "
    '"random" for untrained weights.'
)

StateDict = dict[str, Tensor]
logger = logging.getLogger(__name__)


def load_vfm_weights(
    vit: nn.Module,
    weights: str,
    patch_resize: str = "bicubic",
    fallback: Callable[[], Path] | None = None,
) -> None:
    """Loads public weights into a ViT, all of them or none, and logs what was loaded.

    Where the sizes differ, the patch kernel and the position embedding are resized. "bicubic"
    does this by plain bicubic interpolation, as Rein does: a kernel's sum, so the response to a
    uniform image, grows by (new p / old p)^2, 1.306 from 14 to 16. "pi" is timm's way: the
    pseudo-inverse keeps the response, and the position embedding is resized with antialiasing.

    Args:
        vit: a ViT of timm's, built without a head; changed in place.
        weights: a path; "" for timm's hub and then ``fallback``; or "random", which keeps the
            initial values.
        patch_resize: "bicubic" or "pi".
        fallback: returns a file with timm's names; asked when the hub fails.

    Raises:
        ValueError: ``patch_resize`` is unknown, the file cannot be read, or it does not fit.
        FileNotFoundError: there is no such file.
        RuntimeError: ``weights`` is "" and no source could be reached.
    """
    if patch_resize not in ("bicubic", "pi"):
        raise ValueError(f"MODEL.VFM.PATCH_RESIZE is {patch_resize!r}; known are 'bicubic', 'pi'")
    name = vit.pretrained_cfg["architecture"]
    if weights == "random":
        if next(vit.parameters()).is_meta:  # only counted, never run
            return
        logger.warning(f'{name} keeps its random initialisation (MODEL.VFM.WEIGHTS "random")')
        return
    state, source = _read(weights) if weights else _find(vit, fallback)
    state = _to_timm_names(state, vit)
    state = {key: value.float() for key, value in state.items()}
    _resize(state, vit, patch_resize)
    _load(vit, state, f"{name} from {source}")


def _read(path: str | Path) -> tuple[StateDict, str]:
    """Reads a state dict, bare or under "model", "state_dict" or "teacher"."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}. {REMEDY}")
    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
        state = state.get("teacher", state)
    # Each format has errors of its own: pickle's, zip's, safetensors', timm's.
    except Exception as error:
        raise ValueError(
            f"cannot read weights from {path}: it is damaged, or holds more than tensors "
            f"(such files are refused, as they can run code). {REMEDY}"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: {', '.join(list(state)[:5])}. {REMEDY}")
    return state, str(path)


def _find(vit: nn.Module, fallback: Callable[[], Path] | None) -> tuple[StateDict, str]:
    """Asks timm's hub, then the fallback."""
    sources = [("timm's hub", lambda: _from_hub(vit))]
    if fallback is not None:
        sources.append(("the fallback", lambda: _read(fallback())))
    failures = []
    for label, source in sources:
        try:
            return source()
        # What a network raises depends on the client and its version (requests, httpx, pip).
        except Exception as error:
            failures.append(f"{label}: {type(error).__name__}: {error}")
            logger.warning(f"no weights from {failures[-1]}")
    reasons = "\n".join(f"- {failure}" for failure in failures)
    raise RuntimeError(
        f"no weights for {vit.pretrained_cfg['architecture']}. {REMEDY}\nTried:\n{reasons}"
    )


def _from_hub(vit: nn.Module) -> tuple[StateDict, str]:
    """Downloads the weights of timm's hub, or takes them from its cache."""
    repo = vit.pretrained_cfg.get("hf_hub_id")
    if not repo:
        raise LookupError(f"timm has no weights for {vit.pretrained_cfg['architecture']}")
    cached = try_to_load_from_cache(repo, "model.safetensors")
    if isinstance(cached, str):
        return _read(cached)
    # One quick question first: without a network, the download itself retries for a minute.
    HfApi().model_info(repo, timeout=10)
    return load_state_dict_from_hf(repo), f"https://huggingface.co/{repo}"


def _to_timm_names(state: StateDict, vit: nn.Module) -> StateDict:
    """Converts the authors' names with timm's converter for this family of models."""
    if {key for key in state if not key.startswith(IGNORED)} == set(vit.state_dict()):
        return state
    # The converter also resizes to the model it is given; one of the native size prevents that.
    with torch.device("meta"):
        native = timm.create_model(vit.pretrained_cfg["architecture"], num_classes=0)
    return import_module(type(vit).__module__).checkpoint_filter_fn(state, native)


def _resize(state: StateDict, vit: nn.Module, patch_resize: str) -> None:
    """Resizes patch kernel and position embedding to those of ``vit``, in place."""
    kernel = state.get("patch_embed.proj.weight")  # (D, 3, p, p)
    size = vit.patch_embed.patch_size
    if kernel is not None and kernel.ndim == 4 and tuple(kernel.shape[-2:]) != tuple(size):
        if patch_resize == "pi":
            resized = resample_patch_embed(kernel, list(size))
        else:
            resized = F.interpolate(kernel, size=size, mode="bicubic", align_corners=False)
        state["patch_embed.proj.weight"] = resized
        logger.info(f"patch kernel {tuple(kernel.shape[-2:])} -> {tuple(size)} ({patch_resize})")

    embedding = state.get("pos_embed")  # (1, P + h*w, D)
    if embedding is None or embedding.ndim != 3:
        return
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    patches = embedding.shape[1] - prefix
    side = isqrt(max(patches, 0))
    grid = tuple(vit.patch_embed.grid_size)
    # VFMs are trained on square images; another count fits as it is, or is refused as a mismatch.
    if side * side == patches and (side, side) != grid:
        state["pos_embed"] = resample_abs_pos_embed(
            embedding,
            list(grid),
            old_size=[side, side],
            num_prefix_tokens=prefix,
            antialias=patch_resize == "pi",
            align_corners=False,
        )
        logger.info(f"position embedding {(side, side)} -> {grid} ({patch_resize})")


def _load(vit: nn.Module, state: StateDict, title: str) -> None:
    """Loads ``state`` if it fits in names and shapes, and reports by group."""
    ignored = sorted(key for key in state if key.startswith(IGNORED))
    state = {key: value for key, value in state.items() if key not in ignored}
    wanted = vit.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [
        f"{key} {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    loaded = [key for key in wanted if key in state]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"weights do not fit: {title}. Missing: {_some(missing)}. Unexpected: "
            f"{_some(unexpected)}. Wrong shape: {_some(misshapen)}. {REMEDY} "
            "(A checkpoint of the whole segmentor belongs in MODEL.WEIGHTS.)"
        )
    vit.load_state_dict(state)
    logger.info(
        f"{title}: loaded {_by_group(loaded)}; missing {_by_group(missing)}; "
        f"unexpected {_by_group(unexpected)}; ignored {_some(ignored)}"
    )


def _by_group(names: list[str]) -> str:
    """Counts names by group: "174 (patch_embed 2, tokens 2, blocks 168, norm 2)"."""
    counts = Counter(
        next((g for g, prefixes in GROUPS.items() if name.startswith(prefixes)), "other")
        for name in names
    )
    groups = ", ".join(f"{group} {count}" for group, count in counts.items())
    return f"{len(names)} ({groups})" if names else "0"


def _some(names: list[str]) -> str:
    """The first eight names and how many there are in all."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + rest) or "none"
