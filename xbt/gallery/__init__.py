"""Vectors one can search, grow and backfill: with string ids, and bound to their embedding spaces."""

from __future__ import annotations

from xbt.gallery.backfill_curve import BackfillCurve, StoppingPoint, backfill_curve, stopping_point
from xbt.gallery.backfill_ranks import MixedScores, mixed_ranks
from xbt.gallery.calibration import fit_merge
from xbt.gallery.gallery import Gallery
from xbt.gallery.merge import AffineMerge, IsotonicMerge, Merge, RankMerge, RawMerge, merge_from_dict
from xbt.gallery.order_fastfill import fastfill_order
from xbt.gallery.order_rehearsal import RehearsedOrder, fit_rehearsed_order
from xbt.gallery.orders import distance_to_mean_order, oldest_first, query_log_order, random_order
from xbt.gallery.result import PartSummary, SearchResult

__all__ = [
    "AffineMerge",
    "BackfillCurve",
    "Gallery",
    "IsotonicMerge",
    "Merge",
    "MixedScores",
    "PartSummary",
    "RankMerge",
    "RawMerge",
    "RehearsedOrder",
    "SearchResult",
    "StoppingPoint",
    "backfill_curve",
    "distance_to_mean_order",
    "fastfill_order",
    "fit_merge",
    "fit_rehearsed_order",
    "merge_from_dict",
    "mixed_ranks",
    "oldest_first",
    "query_log_order",
    "random_order",
    "stopping_point",
]
