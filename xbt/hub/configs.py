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
from xbt.hub.files import read_json
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
_dropped: ContextVar[dict[str, list[str]] | None] = ContextVar("dropped", default=None)


class NewerConfigWarning(UserWarning):
    """A saved artifact has settings that only a newer xbt knows; they are ignored."""


class SavedConfig:
    """The config of a saved artifact.

    An unknown key is an error, because it may change the meaning of the vectors. If a newer xbt wrote the
    file, the key is ignored instead, with a warning; see :func:`combined_warning`.

    Attributes:
        file: The config's file.
        values: Its whole content.

    Raises:
        SavedPartError: If the file is missing or is not a JSON object.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values = read_json(file)

    def known(self, keys: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
        """The config with these keys and no others.

        Args:
            keys: Required keys.
            optional: Optional keys.

        Raises:
            SavedPartError: If a key is missing or unknown, and no newer xbt wrote an unknown one.
        """
        missing = sorted(set(keys) - set(self.values))
        if missing:
            raise SavedPartError(
                f"{self.file} lacks or misnames a key: {', '.join(map(repr, missing))} "
                f"{'is' if len(missing) == 1 else 'are'} missing; save or download it again"
            )
        return self.only(self.values, {*keys, *optional})

    def only(self, values: Mapping[str, Any], known: Collection[str], where: str = "") -> dict[str, Any]:
        """A section of the config without the keys that only a newer xbt knows.

        Args:
            values: The section.
            known: Every key it may have.
            where: Name of the section, such as ``"options"``.

        Raises:
            SavedPartError: If it is not an object, or has unknown keys and no newer xbt wrote it.
        """
        if not isinstance(values, Mapping):
            raise SavedPartError(
                f"{self.file} lacks or misnames a key: {where or 'it'} must be an object, got {values!r:.80}"
            )
        unknown = [f"{where}.{key}" if where else key for key in sorted(set(values) - set(known))]
        if unknown:
            self._drop(unknown)
        return {key: value for key, value in values.items() if key in known}

    def space(self, name: str) -> EmbeddingSpace | None:
        """Read a space from the config; ``None`` for null.

        Raises:
            SavedPartError: If it is malformed.
        """
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
