"""What all pictures have in common."""

from __future__ import annotations

DPI = 100
INK, QUIET, RULE, RIGHT = "#1a1a1a", "#6b6b6b", "#d0d0d0", "#15a34a"
LINES = ("#2f6db5", "#e8890c", "#15a34a", "#7d6bb0")
"""Colours of lines."""
OLD, UPGRADED, NEW = "#9a9a9a", "#e8890c", "#2f6db5"
"""Colours of the cells old/old, new/old and new/new."""
