"""How a gallery's parts are merged, beside the gallery: whoever serves it reads it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.gallery.contents import OLD
from xbt.gallery.layout import RECORD, GalleryRecord
from xbt.gallery.merge import Merge, merge_from_dict
from xbt.space import EmbeddingSpace
from xbt.store.files import write_record
from xbt.store.layout import read_record

MERGE = "merge.json"
SPACES = ("old_space", "new_space")

Spaces = tuple[EmbeddingSpace | None, EmbeddingSpace | None]
"""The old space and the new one; ``None`` where nobody knows it."""


def save_merge(
    gallery: str | Path,
    merge: Merge,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
) -> Path:
    """Writes a merge into a gallery's directory, in place of another one.

    Args:
        gallery: The directory.
        merge: What :func:`~xbt.gallery.calibration.fit_merge` chose, say.
        old_space: The space of the scores that it takes for the old part's; the gallery's own unless given.
        new_space: That of the new part's scores; likewise.

    Returns:
        The file.

    Raises:
        StoreError: If it cannot be written.
    """
    path, own = Path(gallery) / MERGE, _spaces_of(Path(gallery))
    spaces = (old_space or own[0], new_space or own[1])
    plain = {
        name: None if space is None else space.to_dict() for name, space in zip(SPACES, spaces, strict=True)
    }
    write_record(path, {**merge.to_dict(), **plain})
    return path


def load_merge(
    gallery: str | Path,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
) -> Merge:
    """Reads the merge that was fitted to a gallery's two models.

    Args:
        gallery: The directory.
        old_space: The space that the gallery comes from; that of its old part unless given.
        new_space: The space that it goes to; likewise.

    Raises:
        DataError: If there is none.
        SpaceMismatchError: If it was fitted to other models, as those of an earlier upgrade.
        ConfigError: If it is of a kind that is not known.
        StoreError: If it is damaged.

    Example:
        >>> gallery, merge = Gallery.open("gallery"), load_merge("gallery")
        >>> gallery.search_mixed(old_queries, new_queries, 10, merge)
    """
    path = Path(gallery) / MERGE
    if not path.is_file():
        raise DataError(
            f"{gallery} has no {MERGE}; run the backfill with --support, or save one with save_merge()"
        )
    merge, made_for = _read(path)
    own = _spaces_of(Path(gallery))
    needed = (old_space or own[0], new_space or own[1])
    for mine, its, way in zip(made_for, needed, ("from", "to"), strict=True):
        if mine is not None and its is not None and not mine.same_as(its):
            raise SpaceMismatchError(
                f"{path} was fitted to the space {mine}, but the gallery goes {way} {its}; run "
                "the backfill with --support, or save one with save_merge()"
            )
    return merge


def is_merge_of(gallery: Path, old_space: EmbeddingSpace | None, new_space: EmbeddingSpace) -> bool:
    """Whether a gallery has a merge, and it is one of these spaces."""
    try:
        load_merge(gallery, old_space, new_space)
    except (DataError, SpaceMismatchError):
        return False
    return True


def _read(path: Path) -> tuple[Merge, Spaces]:
    plain = read_record(path)
    kept = [plain.pop(name, None) for name in SPACES]  # a merge as to_dict() gives it names none
    return merge_from_dict(plain), (_space(path, kept[0]), _space(path, kept[1]))


def _space(path: Path, data: Any) -> EmbeddingSpace | None:
    try:
        return None if data is None else EmbeddingSpace.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); save the merge again with save_merge()") from error


def _spaces_of(gallery: Path) -> Spaces:
    """The spaces of a gallery's parts, as far as it says which one it comes from and which one it goes to."""
    if not (gallery / RECORD).is_file():
        return None, None
    parts = GalleryRecord.read(gallery).parts
    if len(parts) > 1:
        return parts[0].space, parts[1].space
    # Of a part that is left alone nobody knows whether the merge is of the last upgrade or the next one.
    return (parts[0].space, None) if parts[0].name == OLD else (None, None)
