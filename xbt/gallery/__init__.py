"""Vectors one can search, grow and backfill: with string ids, and bound to their embedding spaces."""

from __future__ import annotations

from xbt.gallery.gallery import Gallery
from xbt.gallery.result import PartSummary, SearchResult
from xbt.index.calibration import fit_merge
from xbt.index.mixed import AffineMerge, IsotonicMerge, Merge, RankMerge, RawMerge, merge_from_dict
from xbt.index.mixed_ranks import MixedScores, mixed_ranks

__all__ = [
    "AffineMerge",
    "Gallery",
    "IsotonicMerge",
    "Merge",
    "MixedScores",
    "PartSummary",
    "RankMerge",
    "RawMerge",
    "SearchResult",
    "fit_merge",
    "merge_from_dict",
    "mixed_ranks",
]
