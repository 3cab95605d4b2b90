"""Finding tar files by path, URL, glob or brace pattern, on any file system of fsspec."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from xbt.data.items import readable
from xbt.errors import DataError

_TAR = re.compile(r"\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.IGNORECASE)
# What file systems call it: S3 and HTTP, Google and Azure, the Hub, and those that know dates alone.
_STAMPS = (
    "ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime", "created"
)  # fmt: skip
_QUESTIONS = 16


def is_tar(source: str) -> bool:
    """Whether a source names tar files: one, a glob, or a brace pattern."""
    return _TAR.search(source) is not None


class FoundTar(NamedTuple):
    """A tar file.

    Attributes:
        url: Its path or URL.
        state: Its size and when it was last written (its ETag, or whatever else its file system tells): what
            tells it from one that has taken its place.
    """

    url: str
    state: str


def find_tars(source: str) -> list[FoundTar]:
    """Finds the tar files that a source names.

    Args:
        source: A path or URL of a tar file, a glob (``*.tar``), or a pattern with braces
            (``{000..099}.tar``).

    Returns:
        The tars: a glob's in alphabetical order, a brace pattern's in its own.

    Raises:
        DataError: If there is none, one that is named is missing, or the file system cannot be asked.
    """
    places: list[_Place] = []
    try:
        for pattern in _expand_braces(source):
            files, path = fsspec.core.url_to_fs(pattern)
            if set(path) & set("*?[") and not files.exists(path):
                local = "://" not in pattern
                for name, info in sorted(files.glob(path, detail=True).items()):
                    places.append(_Place(name if local else files.unstrip_protocol(name), files, name, info))
            else:
                places.append(_Place(pattern, files, path, {}))
        # Thousands of questions over a network, where its file system can be asked several at once.
        together = all(place.files.async_impl for place in places)
        with ThreadPoolExecutor(_QUESTIONS if together else 1) as pool:
            states = list(pool.map(_state, places))
    except Exception as error:  # every file system of fsspec has its own errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{source} cannot be looked up ({reason}); check the name") from error
    tars = [FoundTar(place.url, state) for place, state in zip(places, states, strict=True) if state]
    if not tars:
        raise DataError(f"{source}: there is no such tar file; check the path or pattern")
    if len(tars) < len(places):
        raise DataError(
            f"{len(places) - len(tars)} of the {len(places)} tar files of {source} are missing, first "
            f"{places[states.index('')].url}; put them there, or name those that are with a glob such as "
            "*.tar"
        )
    return tars


def is_local(tar: str) -> bool:
    """Whether a path or URL is on this machine's file systems."""
    return fsspec.utils.get_protocol(tar) in ("file", "local")


class _Place(NamedTuple):
    url: str
    files: Any
    path: str
    info: dict[str, Any]


def _state(place: _Place) -> str:
    """What tells a tar from one that has taken its place; empty if there is none."""
    try:
        if isinstance(place.files, LocalFileSystem):
            status = Path(place.path).stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        known = place.info.get("size") is not None
        info = place.info if known else place.files.info(place.path)
    except FileNotFoundError:
        return ""
    stamp = next((info[key] for key in _STAMPS if info.get(key) is not None), "")
    return f"{info.get('size')} {stamp}"


def _expand_braces(pattern: str) -> list[str]:
    """``a{08..10}b`` as ``a08b``, ``a09b``, ``a10b``; ``{x,y}`` likewise; several in one pattern."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    if found[3] is not None:
        options = found[3].split(",")
    else:
        width = len(found[1])
        options = [f"{number:0{width}d}" for number in range(int(found[1]), int(found[2]) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + option + rest for option in options for rest in _expand_braces(after)]


def tar_names(tars: Sequence[str]) -> list[str]:
    """What to call each tar in ids: its path without suffix, relative to the folder that all have in common.

    Raises:
        DataError: If a tar is named twice.
    """
    components = [tar.split("/") for tar in tars]
    common = min(map(len, components)) - 1
    while len({tuple(folders[:common]) for folders in components}) > 1:
        common -= 1
    names = [readable(_TAR.sub("", "/".join(each[common:]))) for each in components]
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise DataError(f"the tar file {twice} is named twice; name every file once")
    return names
