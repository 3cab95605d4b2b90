"""Originals of an index's rows: the images or texts that a new model embeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from xbt.errors import ConfigError, DataError, ImageError
from xbt.images import ListedPath, load_image

Modality = Literal["image", "text"]
Source = Callable[[str], Any] | Mapping[str, Any] | str | os.PathLike[str]
"""Finds originals by id: a function, a mapping, or a folder in which the ids are names of files."""


class MissingOriginal(DataError):
    """An original that does not exist."""


class UnavailableOriginal(DataError):
    """An original that cannot be read now, through no fault of its own: a network or a disk fails."""


class Originals:
    """Reads the originals of rows by id, with the limits of :func:`~xbt.images.read_image`.

    Args:
        source: A function from an id to a path, a PIL image, the bytes of an encoded image, or a text;
            ``None`` or a ``KeyError`` says that there is none. Or a mapping of these by id, such as
            :class:`~xbt.backfill.items.ItemsById`. Or a folder, which no id may leave.
        modality: ``"image"``, or ``"text"`` for an index of texts.

    Raises:
        ConfigError: If the source or the modality is something else.
    """

    def __init__(self, source: Source, modality: Modality = "image") -> None:
        if modality not in ("image", "text"):
            raise ConfigError(f"modality is {modality!r}; use 'image' or 'text'")
        self.modality = modality
        self._find = _finder(source, modality)

    def read(self, item: str) -> Image.Image | str:
        """Read one original completely: an RGB image, or a text.

        Raises:
            MissingOriginal: If there is none.
            ImageError: If it cannot be decoded, or is no text although texts are needed.
            UnavailableOriginal: If the source fails.
        """
        try:
            found = self._find(item)
        except (LookupError, FileNotFoundError):
            found = None
        except Exception as error:
            raise UnavailableOriginal(f"the original of {item!r} cannot be read: {error}") from error
        if found is None:
            raise MissingOriginal(f"there is no original of {item!r}; add it, or remove the item")
        if self.modality == "text":
            if isinstance(found, str) and found.strip():
                return found
            raise ImageError(f"the original of {item!r} is {found!r:.40}; give a text that is not blank")
        try:
            return load_image(found, None if isinstance(found, str | os.PathLike) else f"of {item!r}")
        except ImageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise MissingOriginal(str(error)) from error
            raise
        except DataError as error:  # the system is at fault
            raise UnavailableOriginal(str(error)) from error


def _finder(source: Source, modality: Modality) -> Callable[[str], Any]:
    if isinstance(source, str | os.PathLike):
        folder = Path(source).expanduser()
        if modality == "text" or not folder.is_dir():
            raise ConfigError(
                f"originals is {str(source)!r}, which is no folder of images; give one, or a function or "
                "mapping from ids to originals"
            )
        root = str(folder)
        return lambda item: ListedPath(f"{root}/{item}", root)
    if callable(source):
        return source
    if hasattr(source, "__getitem__"):
        return source.__getitem__
    raise ConfigError(
        f"originals is a {type(source).__name__}; give a folder, or a function or mapping from ids to "
        "originals"
    )
