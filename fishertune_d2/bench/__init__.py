"""The paper's tables as commands: ``python -m fishertune_d2.bench TABLE``; see docs/bench.md."""
