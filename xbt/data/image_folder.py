"""Folders of images."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from xbt.errors import DataError
from xbt.images import ListedPath

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm",
        ".avif", ".heic", ".heif", ".hif", ".jxl",
    ]
)  # fmt: skip
"""Suffixes, in lower case, by which images are recognised in folders and in tar files. What Pillow needs a
plugin for is among them: without the plugin it shall be on record rather than be passed over."""
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
        path = os.path.join(self._root, self._names[index])  # noqa: PTH118 - no Path per image
        return ListedPath(path, self._root)


def list_images(folder: Path) -> list[str]:
    """Lists what an image suffix marks as an image in a folder and the folders below it.

    Whatever bears such a suffix is listed, be it a file or not: what cannot be read shall be on record.
    Links to folders are followed.

    Args:
        folder: Where to look.

    Returns:
        Paths relative to the folder, with forward slashes, sorted.

    Raises:
        DataError: If a folder cannot be listed, or no name has an image suffix.
    """
    names = sorted(_walk(str(folder), "", ()))
    if not names:
        raise DataError(
            f"{folder} holds no image: no name below it ends in .jpg, .png or another image suffix; for tar "
            f"files write {folder}/*.tar"
        )
    return names


def find_images(names: Sequence[str], root: Path) -> list[str]:
    """Finds image files by the names that a caption file gives them.

    COCO's files disagree about folders (``val2014/COCO_val2014_...jpg`` in Karpathy's, the bare name in the
    official ones), and so do the places where people unpack them: a name is looked for as it stands, without
    its folder, and in the folder that COCO's own names tell.

    Args:
        names: Names, perhaps with a folder.
        root: Folder that they are relative to.

    Returns:
        The path of each image.

    Raises:
        DataError: If files are missing (the message counts them and names the first) or cannot be looked up,
            or one file is found by two names: its captions would be those of two images.
    """
    found = [next((path for path in _places(name, root) if _is_file(path)), None) for name in names]
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
                "set image_root to the folder that holds the folders of their names, or mend the names"
            )
    return paths


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # then there is no such file
            return False
        raise DataError(f"{path} cannot be looked up ({error.strerror}); mend that") from error


def _places(name: str, root: Path) -> Iterator[Path]:
    yield root / name
    base = name.rpartition("/")[2]
    yield root / base
    if told := _COCO_NAME.match(base):
        yield root / told[1] / base


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
            status = os.stat(folder)  # noqa: PTH116
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); mend that") from error
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
