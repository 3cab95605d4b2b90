"""How a gallery's parts are merged, beside the gallery: whoever serves it reads it there."""

from __future__ import annotations

from pathlib import Path

from xbt.errors import DataError
from xbt.gallery.merge import Merge, merge_from_dict
from xbt.store.files import write_record
from xbt.store.layout import read_record

MERGE = "merge.json"


def save_merge(gallery: str | Path, merge: Merge) -> Path:
    """Writes a merge into a gallery's directory, in place of another one.

    Args:
        gallery: The directory.
        merge: What :func:`~xbt.gallery.calibration.fit_merge` chose, say.

    Returns:
        The file.

    Raises:
        StoreError: If it cannot be written.
    """
    path = Path(gallery) / MERGE
    write_record(path, merge.to_dict())
    return path


def load_merge(gallery: str | Path) -> Merge:
    """Reads the merge that was fitted to a gallery's two models.

    Args:
        gallery: The directory.

    Raises:
        DataError: If there is none.
        ConfigError: If it is of a kind that is not known.

    Example:
        >>> gallery, merge = Gallery.open("gallery"), load_merge("gallery")
        >>> gallery.search_mixed(old_queries, new_queries, 10, merge)
    """
    path = Path(gallery) / MERGE
    if not path.is_file():
        raise DataError(
            f"{gallery} has no {MERGE}; run the backfill with --support, or save one with save_merge()"
        )
    return merge_from_dict(read_record(path))
