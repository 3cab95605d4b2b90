"""What goes wrong with a saved part."""

from __future__ import annotations

from xbt.errors import XbtError


class SavedPartError(XbtError):
    """A saved part that is missing, damaged or of another kind, or that cannot be shared."""
