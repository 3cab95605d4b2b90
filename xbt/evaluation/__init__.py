"""Exact retrieval metrics and the query/gallery cells of an upgrade."""

from __future__ import annotations

from xbt.evaluation.cells import (
    Cell,
    RetrievalReport,
    criterion,
    differences,
    evaluate_cell,
    evaluate_retrieval,
    recovered_gain,
)
from xbt.evaluation.retrieval import best_positive_ranks, recall_at_k
from xbt.evaluation.significance import (
    Difference,
    Interval,
    bootstrap_interval,
    bootstrap_means,
    compare_ranks,
    hits_at,
)
from xbt.evaluation.table import format_markdown, format_table

__all__ = [
    "Cell",
    "Difference",
    "Interval",
    "RetrievalReport",
    "best_positive_ranks",
    "bootstrap_interval",
    "bootstrap_means",
    "compare_ranks",
    "criterion",
    "differences",
    "evaluate_cell",
    "evaluate_retrieval",
    "format_markdown",
    "format_table",
    "hits_at",
    "recall_at_k",
    "recovered_gain",
]
