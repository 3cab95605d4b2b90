"""Atomic and durable creation of the directory of a gallery."""

from __future__ import annotations

import secrets
import sqlite3
from pathlib import Path

from xbt.errors import StoreError
from xbt.files import sync_directory, writing_to
from xbt.index.faiss_index import IndexPlan
from xbt.index.segments import PartRecord, journal_mode, prepare_database, translated
from xbt.index.storage import DATABASE, SEGMENTS, insert_part
from xbt.index.store_segment import StoreRecord, require_usable
from xbt.store import EmbeddingStore
from xbt.store.layout import store_path
from xbt.store.lock import WriterLock


def create_gallery(
    path: str | Path, plan: IndexPlan, part: PartRecord, store: EmbeddingStore | None = None
) -> Path:
    """Make a gallery of one part, empty or with the rows of a store.

    Args:
        path: The directory, which must be empty or not exist.
        plan: Kind of index.
        part: Description of the part.
        store: A store that is read where it is.

    Returns:
        The directory.

    Raises:
        DataError: If the store has rows that could not be searched rightly.
        StoreError: If the directory holds anything, or cannot be written.
    """
    directory = store_path(path)
    _refuse_files(directory)
    if store is not None:
        require_usable(store)
    _make_directory(directory)
    settings = {"identity": secrets.token_hex(16), "generation": "0"}
    settings |= {"index": plan.factory, "tuning": plan.tuning}
    with WriterLock(directory), translated(directory / DATABASE):
        _refuse_files(directory)  # another process may have made one meanwhile
        _make_directory(directory / SEGMENTS)
        partial = directory / f".{DATABASE}.partial"
        for leftover in directory.glob(f"{partial.name}*"):
            leftover.unlink()
        db = sqlite3.connect(partial, isolation_level=None)
        try:
            prepare_database(db, journal_mode(directory, warn=True))
            db.execute("BEGIN")
            db.executemany("INSERT INTO setting VALUES (?, ?)", settings.items())
            number = insert_part(db, part)
            if store is not None:
                record = StoreRecord.of(store, len(store), directory)
                values = (number, len(store), "", "", record.to_json())
                columns = "(part, count, sha256, described, store)"
                db.execute(f"INSERT INTO segment {columns} VALUES (?, ?, ?, ?, ?)", values)
            db.execute("COMMIT")
        finally:
            db.close()
        partial.replace(directory / DATABASE)
        sync_directory(directory)
    return directory


def _refuse_files(directory: Path) -> None:
    """Refuse a directory with anything but leftovers of a killed attempt."""
    try:
        there = [path.name for path in directory.glob("[!.]*")] if directory.exists() else []
        found = [name for name in sorted(there) if name != SEGMENTS or any((directory / name).iterdir())]
    except OSError as error:
        raise StoreError(
            f"{directory} cannot be read ({error.strerror}); choose another directory"
        ) from error
    if found:
        raise StoreError(
            f"{directory} already holds {found[0]}; open that gallery, or choose another directory"
        )


def _make_directory(path: Path) -> None:
    """Make a directory and its parents, and make their names durable."""
    with writing_to(path, 0):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync_directory(each.parent)
