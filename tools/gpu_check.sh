#!/bin/sh
# Everything that only a GPU can show, in 8 minutes: see gpu_check/check.py for what, and its options.
# $PYTHON: the Python that has torch.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tools/gpu_check "$@"
