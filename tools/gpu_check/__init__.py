"""Checks and measurements that need a GPU: tools/gpu_check.sh."""
