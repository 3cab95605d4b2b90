"""The index that a backfill fills: opened, brought up to date, and given its merge.

Everything here works on any :class:`~xbt.index.VectorIndex`. A gallery on disk also has an approximate index
to bring up to date, and a directory that keeps the merge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xbt.embedding.job import require_free_space
from xbt.errors import ConfigError, DataError, SpaceMismatchError, StoreError
from xbt.files import write_record
from xbt.index.gallery import Gallery
from xbt.index.mixed import Merge, merge_from_dict
from xbt.index.protocol import VectorIndex
from xbt.index.qdrant import QdrantIndex
from xbt.space import EmbeddingSpace
from xbt.store.layout import read_record

MERGE = "merge.json"
SPACES = ("old_space", "new_space")

Spaces = tuple[EmbeddingSpace | None, EmbeddingSpace | None]
"""The old space and the new one; ``None`` where it is not known."""


def open_target(location: str, store: str | None = None) -> VectorIndex:
    """Open the index that a config names: the directory of a gallery, or ``qdrant://HOST:PORT/COLLECTION``.

    ``store`` makes the gallery if there is none; it is not changed.
    """
    scheme, has_scheme, rest = location.partition("://")
    if has_scheme:
        address, _, collection = rest.rpartition("/")
        if scheme != "qdrant" or not address or not collection:
            raise ConfigError(
                f"{location!r} names no index; give the directory of a gallery, or "
                "qdrant://HOST:PORT/COLLECTION"
            )
        if store is not None:
            raise ConfigError(f"--store makes a gallery, but {location} is a database; leave it out")
        return QdrantIndex.open(f"http://{address}", collection)
    if store is not None and not Gallery.exists(location):
        return Gallery.create(location, store=store)
    return Gallery.open(location)


def close_target(index: VectorIndex) -> None:
    """Close an index, if its kind can be closed."""
    close = getattr(index, "close", None)
    if close is not None:
        close()


def refresh(index: VectorIndex) -> None:
    """Make or update the approximate index of a gallery. A database does so itself."""
    if isinstance(index, Gallery):
        index.prepare_index()


def directory_of(index: VectorIndex) -> Path | None:
    """Directory of a gallery on disk; ``None`` of any other index."""
    return index.path if isinstance(index, Gallery) else None


def require_capacity(index: VectorIndex, count: int, dim: int) -> None:
    """Refuse a gallery on a disk without space for ``count`` float16 vectors of ``dim`` numbers."""
    directory = directory_of(index)
    if directory is not None:
        require_free_space(directory, count, dim, "float16")


# -- the merge -----------------------------------------------------------------------------------------


def save_merge(
    gallery: str | Path,
    merge: Merge,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
) -> Path:
    """Write a merge into a gallery's directory, in place of the one that is there.

    Args:
        gallery: The directory of a gallery, or of the job that backfills a database.
        merge: The merge, such as the result of :func:`~xbt.index.fit_merge`.
        old_space: Space of the old scores that it takes; by default that of the gallery.
        new_space: Space of the new scores; likewise.

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
    gallery: str | Path, old_space: EmbeddingSpace | None = None, new_space: EmbeddingSpace | None = None
) -> Merge:
    """Read the merge that was fitted to a gallery's two models.

    Args:
        gallery: The directory.
        old_space: Space that the gallery comes from; by default that of its first vectors.
        new_space: Space that it goes to; likewise.

    Raises:
        DataError: If there is no merge.
        SpaceMismatchError: If it was fitted to other models, such as those of an earlier upgrade.
        ConfigError: If its kind is unknown.
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
    plain = read_record(path)
    spaces = [plain.pop(name, None) for name in SPACES]  # Merge.to_dict() alone names none
    merge, own = merge_from_dict(plain), _spaces_of(Path(gallery))
    fitted = [_space(path, space) for space in spaces]
    needed = (old_space or own[0], new_space or own[1])
    for mine, its, way in zip(fitted, needed, ("from", "to"), strict=True):
        if mine is not None and its is not None and not mine.same_as(its):
            raise SpaceMismatchError(
                f"{path} was fitted to the space {mine}, but the gallery goes {way} {its}; run "
                "the backfill with --support, or save one with save_merge()"
            )
    return merge


def is_merge_of(directory: Path, old_space: EmbeddingSpace | None, new_space: EmbeddingSpace) -> bool:
    """Check if a directory has a merge of these spaces."""
    try:
        load_merge(directory, old_space, new_space)
    except (DataError, SpaceMismatchError):
        return False
    return True


def _space(path: Path, data: Any) -> EmbeddingSpace | None:
    try:
        return None if data is None else EmbeddingSpace.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); save the merge again with save_merge()") from error


def _spaces_of(path: Path) -> Spaces:
    """The spaces that a gallery comes from and goes to, as far as it shows them."""
    if not Gallery.exists(path):
        return None, None
    gallery = Gallery.open(path, read_only=True)
    vectors = gallery.info().vectors
    gallery.close()
    (name, first), *rest = vectors.items()
    if rest:
        return first.space, rest[0][1].space
    # Where one vector is left, the merge may be of the last upgrade or of the next one.
    return (first.space, None) if name == "old" else (None, None)
