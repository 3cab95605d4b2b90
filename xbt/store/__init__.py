"""Vectors on disk, in shards, with their ids and their space."""

from __future__ import annotations

from xbt.store.builder import StoreBuilder
from xbt.store.layout import FileRecord, ShardRecord
from xbt.store.store import EmbeddingStore, find_faults

__all__ = ["EmbeddingStore", "FileRecord", "ShardRecord", "StoreBuilder", "find_faults"]
