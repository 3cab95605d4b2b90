"""The errors xbt raises on purpose.

Each message is one sentence that names the value, the place and the fix. Recipes print it and exit with
status 2; library users catch :class:`XbtError` (a ``ValueError``) or one of its kinds.

What goes wrong with a saved part.
"""

from __future__ import annotations


class XbtError(ValueError):
    """Something the user can fix: the message says what, where and how."""


class ConfigError(XbtError):
    """A configuration key or value that cannot be used."""


class DataError(XbtError):
    """Captions, pairs or vectors that cannot be used (empty, malformed, NaN)."""


class ImageError(DataError):
    """One image that cannot be decoded; the message names it."""


class EncoderError(XbtError):
    """A model that cannot be loaded as a dual encoder, or would be loaded wrongly."""


class StoreError(XbtError):
    """A store on disk that cannot be opened, read or written as it is."""


class SpaceMismatchError(XbtError):
    """Vectors of one embedding space were offered where another is needed; the message names both."""


class TruncationWarning(UserWarning):
    """Texts longer than a model's context length were cut; the message counts them."""


class UnverifiedSpaceWarning(UserWarning):
    """Two spaces were taken for the same, and it is not sure: one has no probe, or settings differ."""


class SavedPartError(XbtError):
    """A saved part that is missing, damaged or of another kind, or that cannot be shared."""
