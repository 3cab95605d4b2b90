"""Types of metadata columns: what can be read over several shards as one column, and what cannot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from xbt.errors import StoreError
from xbt.store.metadata import read_columns, read_types
from xbt.store.shards import ID


class ColumnTypes:
    """The type that each column beside the ids has over some shards, and what does not go together with it.

    Only footers are read, unless a type has to be widened: then the values are looked at as well, since an
    integer beyond 2⁵³, say, is no float.
    """

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._files: dict[Path, None] = {}

    def add(self, files: Iterable[Path]) -> list[str]:
        """Takes in those files that are new.

        Args:
            files: Parquet files in the order of the shards.

        Returns:
            A sentence for each column that cannot be read together with that of the files before.

        Raises:
            StoreError: If a file cannot be read.
        """
        faults = []
        for path in files:
            if path in self._files:
                continue
            for name, kind in read_types(path).items():
                try:
                    self._types[name] = self._wider(name, kind, path)
                except pa.ArrowException:
                    faults.append(f"{path}: {self._mismatch(name, kind)}; write it again with one type")
            self._files[path] = None
        return faults

    def require(self, table: pa.Table, where: str) -> None:
        """Refuses columns that could never be read together with those of the files taken in.

        Args:
            table: What is to be written next.
            where: What to call it.

        Raises:
            StoreError: If there is one; the message names it.
        """
        for name in table.column_names:
            kind = table.schema.field(name).type
            try:
                self._wider(name, kind, table)
            except pa.ArrowException as error:
                raise StoreError(
                    f"{where}: {self._mismatch(name, kind)}; give a column one type over the whole store, or "
                    "take another name"
                ) from error

    def _wider(self, name: str, kind: pa.DataType, source: Path | pa.Table) -> pa.DataType:
        """The type that holds what is there and what comes; an Arrow error if there is none."""
        there = self._types.get(name, kind)
        if name == ID or there.equals(kind):  # ids are read as strings, shard by shard
            return there
        wider = _common(there, kind)
        if not wider.equals(kind):
            _require_exact(source, name, wider)
        if not wider.equals(there):
            for path in self._files:
                _require_exact(path, name, wider)
        return wider

    def _mismatch(self, name: str, kind: pa.DataType) -> str:
        return f"column {name!r} is {kind}, which does not go together with {self._types[name]} before it"


def _common(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("column", kind)]) for kind in (first, second)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _require_exact(source: Path | pa.Table, name: str, kind: pa.DataType) -> None:
    table = source if isinstance(source, pa.Table) else read_columns(source, [name])
    if name in table.column_names:
        table[name].cast(kind)
