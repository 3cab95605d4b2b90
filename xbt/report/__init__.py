"""Pictures for a report: search results side by side, recall as bars, and recall over a backfill.

Figures are made with matplotlib's objects alone, so that drawing neither needs a display nor touches the
state of a notebook's ``pyplot``.
"""

from __future__ import annotations

from xbt.report.backfill_curve import draw_backfill_curve
from xbt.report.recall_bars import draw_recall_bars
from xbt.report.search_comparison import draw_search_comparison

__all__ = ["draw_backfill_curve", "draw_recall_bars", "draw_search_comparison"]
