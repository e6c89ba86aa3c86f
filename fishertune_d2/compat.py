"""Guards against known faults of the dependencies, one function for each fault."""

import re
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# fvcore and Detectron2 compile losses with torch.jit.script as they are imported.
warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
# Older versions of torch do not know the argument that replaces it.
warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)


# The oldest versions that work, as in pyproject.toml, which gives the reasons.
OLDEST = {
    "torch": "2.6",
    "timm": "1.0.31",
    "transformers": "5.0",
    "peft": "0.21",
    "open_clip_torch": "3.0",
}


def require_versions(*packages: str) -> None:
    """Refuses packages of ``OLDEST`` that are older than there, with the command for newer ones."""
    # pip avoids such versions, but not with ``--no-deps``; conda does not avoid them. A missing
    # package raises its own error where it is imported.
    old = []
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(package)
            if _order(version) < _order(OLDEST[package]):
                old.append((package, version))
    if old:
        needed = " and ".join(f"{package} {OLDEST[package]} or newer" for package, _ in old)
        found = " and ".join(f"{package} {version}" for package, version in old)
        install = " ".join(f"'{package}>={OLDEST[package]}'" for package, _ in old)
        raise ImportError(
            f"FisherTune needs {needed}, and {found} {'is' if len(old) == 1 else 'are'} installed: "
            f"run `pip install {install}`; `python -m fishertune_d2.doctor` looks at the whole "
            "environment"
        )


def _order(version: str) -> tuple[list[int], bool]:
    """A key that sorts versions: "2.15.0+cu128" is ([2, 15], True), "2.15.0a0" ([2, 15], False)."""
    # By hand, because torch and pip do not guarantee that the package "packaging" is installed.
    numbers, rest = re.match(r"((?:\d+\.?)*)(.*)", version).groups()
    release = [int(number) for number in numbers.split(".") if number]
    while release and not release[-1]:  # 2.6 is 2.6.0
        release.pop()
    return release, not re.match(r"[._-]?(a|b|c|rc|alpha|beta|pre|dev)", rest)


def has_detectron2() -> bool:
    """Looks for Detectron2 without importing it."""
    return find_spec("detectron2") is not None


def require_detectron2() -> None:
    """Says how to install Detectron2 if it is missing."""
    # It is not on PyPI under its own name, so it cannot be one of our requirements
    # (facebookresearch/detectron2#4859).
    try:
        import detectron2  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "detectron2":  # Detectron2 is there, and lacks another package
            raise
        raise ImportError(
            "FisherTune needs Detectron2, which is not installed: run `python tools/"
            "install_detectron2.py` in a checkout (a wheel, no compiler), or build it with `pip "
            "install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2'`."
        ) from None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switches autocast off, also on a device that has none."""
    # torch.autocast refuses the meta device, even with enabled=False. The plan of a config uses it.
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_waiting_for_constants(device: torch.device) -> AbstractContextManager:
    """Makes ``torch.tensor`` upload Python numbers to a GPU without waiting for the GPU."""
    # torch.tensor(numbers, device="cuda") waits until the GPU has finished all its work. The pixel
    # decoder of transformers calls it seven times in a forward pass, for the sizes of maps.
    return _AsyncConstants() if device.type == "cuda" else nullcontext()


class _AsyncConstants(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        numbers = bool(args) and not isinstance(args[0], torch.Tensor)
        if func in (torch.tensor, torch.as_tensor) and numbers and device is not None:
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made.to(device, non_blocking=True)
        return func(*args, **kwargs)


def wrap_for_ranks(model: nn.Module) -> nn.Module:
    """Wraps the model in DistributedDataParallel if several processes train, on GPUs or CPUs."""
    # Detectron2's create_ddp_model always passes device_ids, which DDP refuses for a model on the
    # CPU. Detectron2's own tests use one process there.
    from detectron2.utils import comm

    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    ids = [comm.get_local_rank()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=ids,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,  # otherwise every gradient exists twice
    )
