"""Scoring on seen and unseen domains."""

from fishertune_d2.evaluation.evaluator import DomainGeneralizationEvaluator
from fishertune_d2.evaluation.table import format_table, summarize

__all__ = ["DomainGeneralizationEvaluator", "format_table", "summarize"]
