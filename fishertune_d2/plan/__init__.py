"""The costs of a config before it runs: ``python -m fishertune_d2.plan --config-file FILE``."""

from .costs import Plan, make_plan
from .stage_costs import Stage
from .text import format_fit, format_hours, format_plan, summary

__all__ = ["Plan", "Stage", "format_fit", "format_hours", "format_plan", "make_plan", "summary"]
