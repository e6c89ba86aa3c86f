"""What a run costs on one GPU: python benchmarks/gpu."""
