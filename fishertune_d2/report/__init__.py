"""One page about a run: its scores, pictures, curves, and what was selected."""

from .page import write_report
from .run import Run, RunError

__all__ = ["Run", "RunError", "write_report"]
