"""Folders of images: listing, lookup by name, and checks of names."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from xbt.data.files import IMAGE_SUFFIXES, find_file
from xbt.data.items import LazyImages
from xbt.errors import DataError
from xbt.images import ListedPath, is_url

_HIDDEN_FOLDERS = frozenset(
    ["@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information"]
)
"""Names, in lower case, of system folders for thumbnails, attributes and deleted files."""
_MAX_SHOWN = 100
_COCO_NAME = re.compile(r"COCO_((?:train|val|test)\d{4})_\d+\.")


class JoinedPaths(LazyImages):
    """Names that are joined to their folder on access, so that millions of full paths need no memory."""

    def __init__(self, root: str | Path, names: Sequence[str]) -> None:
        self._root, self._names = str(root), names

    def __len__(self) -> int:
        return len(self._names)

    def source_at(self, row: int) -> str:
        """One path."""
        name = self._names[row]
        path = os.path.join(self._root, name)  # noqa: PTH118 - no Path per image
        return ListedPath(as_spelled(path, self._root, name), self._root)


def is_hidden(name: str) -> bool:
    """Return True if a name or a folder in it is hidden: ``.thumbnails/a.jpg``, ``@eaDir/a.jpg``."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _HIDDEN_FOLDERS
        for part in name.split("/")
    )


def as_spelled(path: str, root: str, name: str) -> str:
    """Return the path of a file as spelled on disk, which may be another Unicode normal form."""
    if name.isascii() or os.path.lexists(path):
        return path
    with suppress(DataError):  # a name that leaves the folder is refused when it is read
        return str(find_file(root, name) or path)
    return path


def list_images(folder: Path, include_hidden: bool = False) -> list[str]:
    """List the names with an image suffix below a folder, sorted; hidden ones are left out with a warning.

    Every name with such a suffix is listed, even if it is not a file, so that unreadable entries are recorded
    as rejected. Links to folders are followed.
    """
    listed = sorted(_walk(str(folder), "", ()))
    names = listed if include_hidden else [name for name in listed if not is_hidden(name)]
    if len(names) < len(listed):
        first = next(name for name in listed if is_hidden(name))
        count = len(listed) - len(names)
        warnings.warn(f"{count} hidden files of {folder} are left out, first {first}", stacklevel=2)
    if not names:
        raise DataError(
            f"{folder} holds no image: no name below it ends in .jpg, .png or another image suffix; for tar "
            f"files write {folder}/*.tar"
        )
    return names


def find_images(names: Sequence[str], root: Path) -> list[str]:
    """Find the paths of the image files of a caption file by their names, in any Unicode normal form.

    COCO's annotation files disagree about folders: Karpathy's file has ``val2014/COCO_val2014_...jpg``, the
    official ones the bare name. Local copies disagree too. So each name is tried unchanged, without its
    folder, and in the folder that a COCO file name implies. Two names must not lead to the same file, which
    would mix the captions of two images.
    """
    refuse_urls(names[:1], "the file of captions")
    matches = [
        next(filter(None, (find_file(root, candidate) for candidate in _candidates(name))), None)
        for name in names
    ]
    missing = [name for name, path in zip(names, matches, strict=True) if path is None]
    if missing:
        first = missing[0]
        if len(first) > _MAX_SHOWN:
            first = f"{first[:_MAX_SHOWN]}… ({len(first):,} characters)"
        raise DataError(
            f"{len(missing)} of {len(names)} image files are missing, first {first}, "
            f"under {root}; set image_root to the folder that holds the images"
        )
    paths = [str(path) for path in matches]
    first_name: dict[str, str] = {}
    for name, path in zip(names, paths, strict=True):
        other = first_name.setdefault(os.path.normpath(path), name)
        if other != name:  # a name that occurs twice is reported by the caller, who knows the row
            raise DataError(
                f"the images {other!r} and {name!r} are both found as {path}, but two images need two files; "
                "set image_root to the folder that holds the folders of their names, or correct the names"
            )
    return paths


def refuse_urls(values: Sequence[object], where: str) -> None:
    """Check that the first non-blank string is no URL: else a job would reject every image, one by one."""
    first = next((value for value in values if isinstance(value, str) and value.strip()), "")
    if is_url(first):
        raise DataError(
            f"{where} names images by URLs, first {first.strip()[:_MAX_SHOWN]}, which are not fetched; "
            "download the images first, for example with img2dataset, and give the tars or folder it writes"
        )


def _candidates(name: str) -> Iterator[str]:
    yield name
    base = name.rpartition("/")[2]
    yield base
    if split := _COCO_NAME.match(base):
        yield f"{split[1]}/{base}"


def _walk(folder: str, prefix: str, parents: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        with os.scandir(folder) as iterator:
            entries = list(iterator)
            status = os.stat(folder)  # noqa: PTH116
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be listed ({error.strerror}); check its permissions"
        ) from error
    identity = (status.st_dev, status.st_ino)
    if identity in parents:  # a link to one of its own parents
        return
    for entry in entries:
        if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
            yield prefix + entry.name
        if _is_folder(entry):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*parents, identity))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
