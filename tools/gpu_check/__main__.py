"""Runs the command of check.py: python tools/gpu_check."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is a package

from gpu_check.check import main  # noqa: E402

sys.exit(main())
