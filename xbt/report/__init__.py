"""The upgrade report, and pictures: search results side by side, recall as bars, and over a backfill.

Figures are made with matplotlib's objects alone, so that drawing neither needs a display nor touches the
state of a notebook's ``pyplot``.
"""

from __future__ import annotations

from xbt.report.backfill_curve import draw_backfill_curve
from xbt.report.recall_bars import draw_recall_bars
from xbt.report.search_comparison import draw_search_comparison
from xbt.report.upgrade import (
    FailUnder,
    UpgradeReport,
    UpgradeReportConfig,
    VectorSource,
    write_upgrade_report,
)

__all__ = [
    "FailUnder",
    "UpgradeReport",
    "UpgradeReportConfig",
    "VectorSource",
    "draw_backfill_curve",
    "draw_recall_bars",
    "draw_search_comparison",
    "write_upgrade_report",
]
