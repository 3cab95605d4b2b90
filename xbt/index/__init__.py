"""Indexes of vectors that one can search, grow and backfill: the gallery, and adapters to databases."""

from __future__ import annotations

from xbt.index.calibration import MixedScores, fit_merge, mixed_ranks
from xbt.index.cascade import Cascade, cascaded_search
from xbt.index.gallery import Gallery
from xbt.index.mixed import (
    AffineMerge,
    IsotonicMerge,
    Merge,
    RankMerge,
    RawMerge,
    merge_from_dict,
    search_mixed,
)
from xbt.index.on_demand import CascadeStatistics
from xbt.index.parts import PartSummary
from xbt.index.protocol import Batch, Hits, IndexInfo, VectorIndex, VectorInfo
from xbt.index.qdrant import QdrantIndex

__all__ = [
    "AffineMerge",
    "Batch",
    "Cascade",
    "CascadeStatistics",
    "Gallery",
    "Hits",
    "IndexInfo",
    "IsotonicMerge",
    "Merge",
    "MixedScores",
    "PartSummary",
    "QdrantIndex",
    "RankMerge",
    "RawMerge",
    "VectorIndex",
    "VectorInfo",
    "cascaded_search",
    "fit_merge",
    "merge_from_dict",
    "mixed_ranks",
    "search_mixed",
]
