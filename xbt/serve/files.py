"""Files of an export: each appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xbt.errors import StoreError
from xbt.store.files import sync_directory

_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; at the end the file is synchronised and renamed.

    Args:
        path: The file; its directory is made, and one that is there is replaced.

    Raises:
        StoreError: If the disk is full or the place cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise StoreError(
                f"there is no space for {path} ({reason}); free some space and export again"
            ) from error
        raise StoreError(
            f"{path} cannot be written ({reason}); choose a directory you may write to"
        ) from error
    finally:
        # Where the place cannot be looked into either, there is nothing to remove.
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)
