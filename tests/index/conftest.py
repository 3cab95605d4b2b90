from __future__ import annotations

from serving import new_space, old_space, other_space, rows, store

__all__ = ["new_space", "old_space", "other_space", "rows", "store"]
