"""Folders of images."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import overload

from xbt.data.files import IMAGE_SUFFIXES, find_file
from xbt.errors import DataError
from xbt.images import ListedPath, is_url

_HIDDEN_FOLDERS = frozenset(
    ["@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information"]
)
"""Folders, in lower case, in which systems keep thumbnails, attributes and what was deleted."""
_LONGEST_SHOWN = 100
_COCO_NAME = re.compile(r"COCO_((?:train|val|test)\d{4})_\d+\.")


class JoinedPaths(Sequence[str]):
    """Names joined to their folder when one is asked for: millions of full paths need not be kept."""

    def __init__(self, root: str | Path, names: Sequence[str]) -> None:
        self._root, self._names = str(root), names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        name = self._names[index]
        path = os.path.join(self._root, name)  # noqa: PTH118 - no Path per image
        return ListedPath(as_spelled(path, self._root, name), self._root)


def is_hidden(name: str) -> bool:
    """True if a name, or a folder in it, is hidden: ``.thumbnails/a.jpg``, ``._a.jpg``, ``@eaDir/a.jpg``."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _HIDDEN_FOLDERS
        for part in name.split("/")
    )


def as_spelled(path: str, root: str, name: str) -> str:
    """The path of a file, as it is spelled on disk if that is another Unicode normal form."""
    if name.isascii() or os.path.lexists(path):
        return path
    with suppress(DataError):  # a name that leads out of the folder is refused when it is read
        return str(find_file(root, name) or path)
    return path


def list_images(folder: Path, include_hidden: bool = False) -> list[str]:
    """Lists what an image suffix marks as an image in a folder and the folders below it.

    Whatever has such a suffix is listed, be it a file or not: what cannot be read goes on record. Links to
    folders are followed.

    Args:
        folder: Where to look.
        include_hidden: Lists hidden files and folders as well; see :func:`is_hidden`.

    Returns:
        Paths relative to the folder, with forward slashes, sorted.

    Raises:
        DataError: If a folder cannot be listed, or no name has an image suffix.

    Warns:
        UserWarning: If hidden files were left out.
    """
    found = sorted(_walk(str(folder), "", ()))
    names = found if include_hidden else [name for name in found if not is_hidden(name)]
    if len(names) < len(found):
        first = next(name for name in found if is_hidden(name))
        count = len(found) - len(names)
        warnings.warn(f"{count} hidden files of {folder} are left out, first {first}", stacklevel=2)
    if not names:
        raise DataError(
            f"{folder} holds no image: no name below it ends in .jpg, .png or another image suffix; for tar "
            f"files write {folder}/*.tar"
        )
    return names


def find_images(names: Sequence[str], root: Path) -> list[str]:
    """Finds image files by the names that a caption file gives them, in any Unicode normal form.

    COCO's files disagree about folders (``val2014/COCO_val2014_...jpg`` in Karpathy's, the bare name in the
    official ones), and so do the places where people unpack them: a name is looked for as it stands, without
    its folder, and in the folder that COCO's own names say.

    Args:
        names: Names, perhaps with a folder.
        root: Folder that they are relative to.

    Returns:
        The path of each image.

    Raises:
        DataError: If files are missing (the message counts them and names the first) or cannot be looked up,
            a name is a URL or leads out of the folder, or one file is found by two names: its captions would
            be those of two images.
    """
    refuse_urls(names[:1], "the file of captions")
    found = [next(filter(None, (find_file(root, place) for place in _places(name))), None) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        first = missing[0]
        if len(first) > _LONGEST_SHOWN:
            first = f"{first[:_LONGEST_SHOWN]}… ({len(first):,} characters)"
        raise DataError(
            f"{len(missing)} of {len(names)} image files are missing, first {first}, "
            f"under {root}; set image_root to the folder that holds the images"
        )
    paths = [str(path) for path in found]
    first_name: dict[str, str] = {}
    for name, path in zip(names, paths, strict=True):
        other = first_name.setdefault(os.path.normpath(path), name)
        if other != name:  # of one name twice, whoever reads the file knows the place
            raise DataError(
                f"the images {other!r} and {name!r} are both found as {path}, but two images are two files; "
                "set image_root to the folder that holds the folders of their names, or correct the names"
            )
    return paths


def refuse_urls(values: Sequence[object], where: str) -> None:
    """Checks that images are not named by URLs: a job would find none of them, one by one.

    Args:
        values: Some of the values that stand for images.
        where: What holds them, for the message.

    Raises:
        DataError: If the first text among them is a URL.
    """
    first = next((value for value in values if isinstance(value, str) and value.strip()), "")
    if is_url(first):
        raise DataError(
            f"{where} names images by URLs, first {first.strip()[:_LONGEST_SHOWN]}, which are not fetched; "
            "download the images first, for example with img2dataset, and give the tars or folder it writes"
        )


def _places(name: str) -> Iterator[str]:
    yield name
    base = name.rpartition("/")[2]
    yield base
    if split := _COCO_NAME.match(base):
        yield f"{split[1]}/{base}"


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
            status = os.stat(folder)  # noqa: PTH116
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); correct that") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder that it lies in
        return
    for entry in entries:
        if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
            yield prefix + entry.name
        if _is_folder(entry):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, identity))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False
