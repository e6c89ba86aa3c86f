"""Prints the device and the versions that a time depends on as JSON: about.py DEVICE."""

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata

import torch


def about(device: str) -> dict[str, object]:
    """Returns the device's name, and versions by package.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
    """
    found: dict[str, object] = {"device": "CPU", "python": platform.python_version()}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
        found["cuda"] = torch.version.cuda
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True)
            found["driver"] = done.stdout.strip()
    for name in ("torch", "torchvision", "timm", "transformers", "peft", "numpy"):
        found[name] = metadata.version(name)
    return found


if __name__ == "__main__":
    print(json.dumps(about(sys.argv[1])))
