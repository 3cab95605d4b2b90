"""Vectors on disk, in shards, with their ids and their space."""

from __future__ import annotations

from xbt.files import FileRecord
from xbt.store.builder import StoreBuilder
from xbt.store.layout import ShardRecord
from xbt.store.store import EmbeddingStore, find_faults

__all__ = ["EmbeddingStore", "FileRecord", "ShardRecord", "StoreBuilder", "find_faults"]
