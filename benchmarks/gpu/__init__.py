"""Measures the cost of a run on one GPU: python benchmarks/gpu."""
