"""Vectors one can search: exact, with string ids, and bound to their embedding space."""

from __future__ import annotations

from xbt.gallery.gallery import Gallery, SearchResult

__all__ = ["Gallery", "SearchResult"]
