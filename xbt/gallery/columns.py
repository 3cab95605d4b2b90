"""The metadata columns of one part: over all its segments they must go together, or nobody can read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from xbt.errors import StoreError
from xbt.gallery.memory_segment import MemorySegment
from xbt.gallery.segments import Segment, StoredSegment
from xbt.store.column_types import ColumnTypes
from xbt.store.layout import metadata_file
from xbt.store.shards import ID, as_table


class PartColumns:
    """What a part's segments have beside their ids, as far as it decides what may be added."""

    def __init__(self) -> None:
        self._types = ColumnTypes()

    def checked(
        self, segments: Sequence[Segment], ids: Sequence[str], metadata: Any, where: str
    ) -> pa.Table | None:
        """Columns that are to be added, as a table.

        Args:
            segments: The part's.
            ids: Of the items to be added.
            metadata: Their columns; a mapping, a table or ``None``.
            where: What they are added to, for the message.

        Raises:
            StoreError: If a column has another length than there are ids, cannot be stored, or does not go
                together with what the part has under its name; the message names it.
        """
        if metadata is None:
            return None
        table = as_table(ids, metadata, len(ids), where).drop_columns([ID])
        stores = [each.store for each in segments if isinstance(each, StoredSegment)]
        files = [
            store.path / metadata_file(shard.name)
            for store in stores
            if store.columns
            for shard in store.shards
        ]
        self._types.add(files)
        self._types.require(table, where)
        kept = [each.table for each in segments if isinstance(each, MemorySegment)]
        stacked([*(each for each in kept if each is not None), table], where)
        return table if table.num_columns else None


def stacked(tables: Sequence[pa.Table], where: str) -> pa.Table:
    """Tables below each other; null where one lacks a column.

    Args:
        tables: At least one.
        where: Whose they are, for the message.

    Raises:
        StoreError: If a column has types that do not go together; the message names it.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(f"{where}: {_odd_column(tables)}") from error


def _odd_column(tables: Sequence[pa.Table]) -> str:
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        own = [table.select([name]) for table in tables if name in table.column_names]
        for count in range(2, len(own) + 1):
            try:
                pa.concat_tables(own[:count], promote_options="permissive")
            except pa.ArrowException:
                above, below = (each.schema.field(name).type for each in own[count - 2 : count])
                return (
                    f"column {name!r} is {below}, which does not go together with {above} before it; give a "
                    "column one type over the whole gallery, or take another name"
                )
    raise AssertionError("every column can be stacked alone, so all can")
