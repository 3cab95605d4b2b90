"""Hugging Face data sets read as streams, without downloading them first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from xbt.data.hf_datasets import as_image, image_roots, undecoded
from xbt.data.hf_folders import HUB_PREFIX, directory_of, open_builder, translated, was_saved
from xbt.data.image_text_pairs import Rejected
from xbt.data.items import Entry, Item, Part, digest_of, readable
from xbt.errors import DataError


class StreamedImages(Part):
    """The images of one file (one shard) of a streamed data set."""

    def __init__(
        self,
        shard: Any,
        name: str,
        column: str,
        id_column: str | None,
        roots: Sequence[str],
        state: str = "",
    ) -> None:
        """Keeps what it is given.

        Args:
            shard: A ``datasets.IterableDataset`` with nothing but the columns that follow, undecoded.
            name: What ids begin with, unless a column gives them.
            column: The image column.
            id_column: The column of ids, if there is one.
            roots: Folders that paths in the image column may lead into, the one they are relative to first.
            state: What tells the data set's files from others in their place.
        """
        self.name, self._state = name, state
        self._shard, self._column, self._id_column, self._roots = shard, column, id_column, roots

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads rows ``start`` to ``stop``, undecoded.

        Raises:
            DataError: If the stream breaks off.
        """
        rows = iter(self._shard.skip(start) if start else self._shard)
        row = start
        while stop is None or row < stop:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the hub client, fsspec and pyarrow share no kind of error
                reason = " ".join(str(error).split())[:300]
                raise DataError(
                    f"{self.name} cannot be read beyond row {row} ({type(error).__name__}: {reason}); fix "
                    "that and run the same command again"
                ) from error
            yield self._entry(cells, row)
            row += 1

    def digest(self) -> str:
        """SHA-256 of the name and the state: after files were replaced, their rows would be mixed."""
        return digest_of([self.name, self._state])

    def _entry(self, cells: dict[str, Any], row: int) -> Entry:
        name = f"{self.name}/row-{row}"
        if self._id_column is not None:
            if cells[self._id_column] is None:
                return Rejected(name, f"the row has no id: its {self._id_column!r} is empty")
            name = readable(str(cells[self._id_column]))
        return Item(name, as_image(cells[self._column], self._roots), {})


def stream_images(
    source: str,
    subset: str | None,
    split: str | None,
    column: str,
    id_column: str | None,
    image_root: str | None = None,
) -> list[StreamedImages]:
    """Opens an image column of a data set as streams, one for each of its own shards.

    Args:
        source: ``hf:`` and the name of a Hub data set, or a local directory with parquet or jsonl files.
        subset: Configuration of a Hub data set.
        split: Which split; may be left out where there is only one.
        column: The image column.
        id_column: A column of unique ids; otherwise shard and row make the id.
        image_root: Folder that paths in the image column are relative to; the data set's own where it is
            local.

    Returns:
        The streams, in the data set's order.

    Raises:
        DataError: If it cannot be opened as a stream, or lacks the split or a column.
    """
    dataset, state = _open(source, subset, split)
    if dataset.column_names is None:
        raise DataError(f"{source} does not say which columns it has; leave out streaming")
    dataset = undecoded(dataset, column, source, *([id_column] if id_column is not None else []))
    count = dataset.num_shards
    width = len(str(count - 1))
    return [
        StreamedImages(
            dataset.shard(num_shards=count, index=number),
            f"shard-{number:0{width}d}",
            column,
            id_column,
            image_roots(source, image_root),
            state,
        )
        for number in range(count)
    ]


def _open(source: str, subset: str | None, split: str | None) -> tuple[Any, str]:
    """The stream, and the state of its files."""
    directory = directory_of(source)
    if directory is not None and was_saved(directory):
        raise DataError(f"{source} was made by save_to_disk and cannot be streamed; leave out streaming")
    with translated(source, "check its name and subset, or leave out streaming"):
        if directory is None:
            builder = datasets.load_dataset_builder(source.removeprefix(HUB_PREFIX), subset)
        else:
            builder = open_builder(directory, subset)
        opened = builder.as_streaming_dataset()
    names = ", ".join(opened)
    if split is None and len(opened) > 1:
        raise DataError(f"{source} has the splits {names}; choose one with split")
    split = split or next(iter(opened))
    if split not in opened:
        raise DataError(f"{source} has no split {split!r}; it has {names}")
    return opened[split], _state((builder.config.data_files or {}).get(split))


def _state(files: Any) -> str:
    """Sizes and times of local files; names, revisions and ETags of others."""
    local = [Path(file) for file in files or ()]
    if all(path.is_file() for path in local):
        return " ".join(f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in local)
    return f"{list(files)} {files.origin_metadata}"
