"""Reading the config of a saved artifact: known keys, missing keys, and keys of a newer xbt."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from xbt.errors import SavedPartError
from xbt.hub.files import Naming, check_digests, read_json
from xbt.space import EmbeddingSpace
from xbt.version import __version__

_SPACE_TYPES: dict[str, Any] = {
    "model": str,
    "dim": int,
    "revision": str | None,
    "normalisation": str,
    "preprocessing": dict | None,
    "settings": dict | None,
    "probe": str | None,
}
_SPACE_KEYS = (*_SPACE_TYPES, "probe_version")
COMMON_KEYS = ("format", "xbt_version")
"""Keys of every config: which kind of artifact it describes, and the version of xbt that wrote it."""
DIGESTS_KEY = "sha256"
"""Key of the digests of the files beside the config."""
_dropped: ContextVar[dict[str, list[str]] | None] = ContextVar("dropped", default=None)


def described_space(space: EmbeddingSpace | None, naming: Naming) -> dict[str, Any] | None:
    """A space as :meth:`SavedConfig.space` reads it, with its model's name in the given form."""
    return None if space is None else space.to_dict() | {"model": naming(space.model)}


class NewerConfigWarning(UserWarning):
    """A saved artifact has settings that only a newer xbt knows; they are ignored."""


class SavedConfig:
    """The config of a saved artifact, with the keys of its format and no others.

    An unknown key is an error, because it may change the meaning of the vectors. If a newer xbt wrote the
    file, the key is ignored instead, with a warning; see :func:`combined_warning`.

    Args:
        file: The config's file.
        form: Name of the format it must have, such as ``"compatible_backbone"``.
        keys: Keys that the format requires, beside :data:`COMMON_KEYS`.
        optional: Keys that the format may have.

    Attributes:
        values: Its content, without the keys that only a newer xbt knows.
    """

    def __init__(
        self, file: Path, form: str, keys: Collection[str] = (), optional: Collection[str] = ()
    ) -> None:
        self.file = file
        self.values = read_json(file)
        if self.values.get("format") != form:
            raise SavedPartError(
                f"{file} does not describe a {form.replace('_', ' ')}: its format is "
                f"{self.values.get('format')!r:.80}; load another directory, or save it again"
            )
        missing = sorted({*COMMON_KEYS, *keys} - set(self.values))
        if missing:
            raise SavedPartError(
                f"{file} lacks or misnames a key: {', '.join(map(repr, missing))} "
                f"{'is' if len(missing) == 1 else 'are'} missing; save or download it again"
            )
        self.values = self.only(self.values, {*COMMON_KEYS, *keys, *optional, DIGESTS_KEY})

    def only(self, values: Mapping[str, Any], keys: Collection[str], where: str = "") -> dict[str, Any]:
        """A section ``where`` of the config without the keys that only a newer xbt knows."""
        if not isinstance(values, Mapping):
            raise SavedPartError(
                f"{self.file} lacks or misnames a key: {where or 'it'} must be an object, got {values!r:.80}"
            )
        unknown = [f"{where}.{key}" if where else key for key in sorted(set(values) - set(keys))]
        if unknown:
            self._drop(unknown)
        return {key: value for key, value in values.items() if key in keys}

    def space(self, name: str) -> EmbeddingSpace | None:
        """Read a space from the config; ``None`` for null."""
        described = self.values[name]
        if described is None:
            return None
        values = self.only(described, _SPACE_KEYS, name)
        for key, kinds in _SPACE_TYPES.items():
            if key in values and (not isinstance(values[key], kinds) or isinstance(values[key], bool)):
                raise SavedPartError(
                    f"{self.file} lacks or misnames a key: {name}.{key} is {values[key]!r:.80}; save or "
                    "download it again"
                )
        try:
            space = EmbeddingSpace.from_dict(values)
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise SavedPartError(f"{self.file} lacks or misnames a key: {name}: {error}") from error
        if space.dim < 1 or (space.probe is not None and not space.probe.isfinite().all()):
            raise SavedPartError(
                f"{self.file} lacks or misnames a key: {name} has the dimension {space.dim} and a probe that "
                "may hold NaN; save or download it again"
            )
        return space

    def check_files(self) -> None:
        """Compare the files beside the config with the digests that it records, if it does."""
        check_digests(self.file.parent, self.values.get(DIGESTS_KEY))

    def _drop(self, unknown: list[str]) -> None:
        written = self.values.get("xbt_version")
        if not _is_newer(written):
            raise SavedPartError(
                f"{self.file} lacks or misnames a key: {', '.join(unknown)} "
                f"{'is' if len(unknown) == 1 else 'are'} not known to xbt {__version__}, and no newer one "
                "wrote it; save or download it again"
            )
        gathered = _dropped.get()
        if gathered is None:
            _warn(str(written), unknown)
        else:
            gathered.setdefault(str(written), []).extend(unknown)


@contextmanager
def combined_warning() -> Iterator[None]:
    """Gather the ignored settings of several configs within the block into one warning at its end."""
    if _dropped.get() is not None:
        yield
        return
    gathered: dict[str, list[str]] = {}
    token = _dropped.set(gathered)
    try:
        yield
    finally:
        _dropped.reset(token)
    for written, unknown in gathered.items():
        _warn(written, unknown)


def _warn(written: str, unknown: list[str]) -> None:
    warnings.warn(
        f"xbt {written} wrote this and knows settings that xbt {__version__} does not: "
        f"{', '.join(dict.fromkeys(unknown))}; they are ignored, so the vectors may be wrong: update xbt",
        NewerConfigWarning,
        stacklevel=4,
    )


def _is_newer(written: object) -> bool:
    try:
        return isinstance(written, str) and Version(written) > Version(__version__)
    except InvalidVersion:
        return False
