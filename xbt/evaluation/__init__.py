"""Exact retrieval metrics and the query/gallery cells of an upgrade."""

from __future__ import annotations

from xbt.evaluation.bootstrap import (
    Difference,
    Interval,
    bootstrap_interval,
    bootstrap_means,
    compare_ranks,
    hits_at,
)
from xbt.evaluation.cells import (
    Cell,
    RetrievalReport,
    criterion,
    differences,
    evaluate_cell,
    evaluate_retrieval,
    recovered_gain,
)
from xbt.evaluation.classes import LabelRetrieval, evaluate_labels
from xbt.evaluation.compatibility import (
    AverageCompatibility,
    CompatibilityMatrix,
    compatibility_matrix,
    compatibility_tax,
    difference_over_seeds,
    over_seeds,
    prefix_vectors,
    update_gain,
)
from xbt.evaluation.depth import DepthCurve, DepthPoint, depth_curve
from xbt.evaluation.protocols import (
    PROTOCOLS,
    CheckedReport,
    Comparison,
    Expectation,
    Protocol,
    average_folds,
    check_report,
    find_protocol,
)
from xbt.evaluation.retrieval import best_positive_ranks, recall_at_k
from xbt.evaluation.table import format_markdown, format_table

__all__ = [
    "PROTOCOLS",
    "AverageCompatibility",
    "Cell",
    "CheckedReport",
    "Comparison",
    "CompatibilityMatrix",
    "DepthCurve",
    "DepthPoint",
    "Difference",
    "Expectation",
    "Interval",
    "LabelRetrieval",
    "Protocol",
    "RetrievalReport",
    "average_folds",
    "best_positive_ranks",
    "bootstrap_interval",
    "bootstrap_means",
    "check_report",
    "compare_ranks",
    "compatibility_matrix",
    "compatibility_tax",
    "criterion",
    "depth_curve",
    "difference_over_seeds",
    "differences",
    "evaluate_cell",
    "evaluate_labels",
    "evaluate_retrieval",
    "find_protocol",
    "format_markdown",
    "format_table",
    "hits_at",
    "over_seeds",
    "prefix_vectors",
    "recall_at_k",
    "recovered_gain",
    "update_gain",
]
