"""Scoring on seen and unseen domains."""

from fishertune_d2.evaluation.evaluator import DomainGeneralizationEvaluator, best_classes
from fishertune_d2.evaluation.table import all_scores, format_table, summarize

__all__ = [
    "DomainGeneralizationEvaluator",
    "all_scores",
    "best_classes",
    "format_table",
    "summarize",
]
