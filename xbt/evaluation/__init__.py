"""Exact retrieval metrics and the query/gallery cells of an upgrade."""

from __future__ import annotations

from xbt.evaluation.cells import (
    Cell,
    RetrievalReport,
    criterion,
    evaluate_cell,
    evaluate_retrieval,
    recovered_gain,
)
from xbt.evaluation.retrieval import best_positive_ranks, recall_at_k
from xbt.evaluation.table import format_markdown, format_table

__all__ = [
    "Cell",
    "RetrievalReport",
    "best_positive_ranks",
    "criterion",
    "evaluate_cell",
    "evaluate_retrieval",
    "format_markdown",
    "format_table",
    "recall_at_k",
    "recovered_gain",
]
