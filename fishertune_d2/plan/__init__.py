"""What a config costs, before it runs: ``python -m fishertune_d2.plan --config-file FILE``."""

from .plan import Plan, make_plan
from .report import format_fit, format_plan, summary
from .stages import Stage

__all__ = ["Plan", "Stage", "format_fit", "format_plan", "make_plan", "summary"]
