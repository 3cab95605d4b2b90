"""The upgrade report, and pictures: search results side by side, recall as bars, and over a backfill.

Figures are made with matplotlib's objects alone, so that drawing neither needs a display nor touches the
state of a notebook's ``pyplot``.
"""

from __future__ import annotations

from xbt.report.config import FailUnder, UpgradeReportConfig, VectorSource
from xbt.report.figures import draw_backfill_curve, draw_recall_bars, draw_search_comparison
from xbt.report.job import write_upgrade_report
from xbt.report.result import UpgradeReport

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
