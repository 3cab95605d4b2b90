"""The upgrade report, and figures: search results side by side, recall bars, recall over a backfill.

Figures use matplotlib's objects without ``pyplot``, so they need no display and do not change the state of a
notebook.
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
