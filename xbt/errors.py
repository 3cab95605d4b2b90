"""Errors and warnings of xbt.

Each message is one sentence that names the value, the place and the fix. Recipes print it and exit with
status 2. Library users catch :class:`XbtError` (a ``ValueError``) or one of its kinds.
"""

from __future__ import annotations


class XbtError(ValueError):
    """An error that the user can fix; the message names the value, the place and the fix."""


class ConfigError(XbtError):
    """An unusable configuration key or value."""


class DataError(XbtError):
    """Unusable captions, pairs or vectors: empty, malformed or NaN."""


class ImageError(DataError):
    """An image that cannot be decoded; the message names it."""


class EncoderError(XbtError):
    """A model that cannot be loaded correctly as a dual encoder."""


class StoreError(XbtError):
    """A store or file on disk that cannot be opened, read or written."""


class BusyError(StoreError):
    """A store that another process is writing; it can be tried again."""


class SpaceMismatchError(XbtError):
    """Vectors of one embedding space where another is needed; the message names both."""


class TruncationWarning(UserWarning):
    """Texts were cut to a model's context length; the message gives their number."""


class UnverifiedSpaceWarning(UserWarning):
    """Two spaces were treated as the same without proof: one has no probe, or settings differ."""


class SavedPartError(XbtError):
    """A saved artifact that is missing, damaged, of another kind, or cannot be shared."""
