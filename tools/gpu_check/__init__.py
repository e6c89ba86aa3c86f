"""Checks and measures what only a GPU shows: tools/gpu_check.sh."""
