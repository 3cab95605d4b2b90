"""Indexes of vectors that one can search, grow and backfill."""

from __future__ import annotations

from xbt.index.protocol import Batch, Hits, IndexInfo, VectorIndex, VectorInfo

__all__ = ["Batch", "Hits", "IndexInfo", "VectorIndex", "VectorInfo"]
