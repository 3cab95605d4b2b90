"""Finding tar files by path, URL, glob or brace pattern, on any file system of fsspec."""

from __future__ import annotations

import re
from collections.abc import Sequence

import fsspec  # type: ignore[import-untyped]

from xbt.data.items import readable
from xbt.errors import DataError

_TAR = re.compile(r"\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.IGNORECASE)


def is_tar(source: str) -> bool:
    """Whether a source names tar files: one, a glob, or a brace pattern."""
    return _TAR.search(source) is not None


def find_tars(source: str) -> list[str]:
    """Finds the tar files that a source names.

    Args:
        source: A path or URL of a tar file, a glob (``*.tar``), or a pattern with braces
            (``{000..099}.tar``).

    Returns:
        Paths or URLs: a glob's in alphabetical order, a brace pattern's in its own, whether or not each of
        them exists.

    Raises:
        DataError: If none of them exists, or the file system cannot be asked.
    """
    tars: list[str] = []
    try:
        for pattern in _expand_braces(source):
            files, path = fsspec.core.url_to_fs(pattern)
            if set(path) & set("*?[") and not files.exists(path):
                local = "://" not in pattern
                tars += [name if local else files.unstrip_protocol(name) for name in sorted(files.glob(path))]
            else:
                tars.append(pattern)
        there = any(_exists(tar) for tar in tars)
    except Exception as error:  # every file system of fsspec has its own errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{source} cannot be looked up ({reason}); check the name") from error
    if not there:
        raise DataError(f"{source}: there is no such tar file; check the path or pattern")
    return tars


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


def _exists(tar: str) -> bool:
    files, path = fsspec.core.url_to_fs(tar)
    return bool(files.exists(path))


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
