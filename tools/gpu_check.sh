#!/bin/sh
# Runs the checks that need a GPU, in 8 minutes. gpu_check/check.py explains them and the options.
# $PYTHON names the Python that has torch.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tools/gpu_check "$@"
