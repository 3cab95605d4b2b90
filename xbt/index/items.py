"""Items of a store or a gallery, read in batches of a few thousand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError, StoreError
from xbt.index.gallery import Gallery
from xbt.space import EmbeddingSpace
from xbt.store.store import EmbeddingStore

Source = EmbeddingStore | Gallery
"""A source of items."""

AT_ONCE = 4096


class Items(NamedTuple):
    """Batch of n items: ids, (n, dim) float32 vectors, and their metadata as a table without the ids."""

    ids: list[str]
    vectors: NDArray[np.float32]
    metadata: Any | None


@dataclass(frozen=True)
class Portion:
    """Items of a source in one space: all of a store, or one part of a gallery."""

    source: Source
    space: EmbeddingSpace | None
    dim: int
    count: int
    part: str | None = None

    def batches(self, size: int = AT_ONCE) -> Iterator[Items]:
        """Iterate over all items in order, at most ``size`` at a time."""
        for start, ids in self._ids(size):
            if isinstance(self.source, EmbeddingStore):
                vectors = self.source.read(start, start + len(ids))
            else:
                vectors = self.source.vectors(ids, self.part)
            yield Items(ids, vectors, self._metadata(start, ids))

    def columns(self) -> list[Any]:
        """Fields of the metadata, with types that fit all batches."""
        tables = [self._metadata(start, ids) for start, ids in self._ids(AT_ONCE)]
        schemas = [table.schema.remove_metadata() for table in tables if table is not None]
        return list(pa.unify_schemas(schemas, promote_options="permissive")) if schemas else []

    def _ids(self, size: int) -> Iterator[tuple[int, list[str]]]:
        if isinstance(self.source, EmbeddingStore):
            for start in range(0, self.count, size):
                yield start, self.source.read_ids(start, min(start + size, self.count))
        else:
            everything = self.source.ids_of(self.part or "")
            for start in range(0, len(everything), size):
                yield start, everything[start : start + size]

    def _metadata(self, start: int, ids: list[str]) -> Any | None:
        if isinstance(self.source, EmbeddingStore):
            there = self.source.columns
            return self.source.metadata(there, start, start + len(ids)) if there else None
        return self.source.metadata(ids, self.part)


def portions(source: Source) -> tuple[Portion, ...]:
    """List the parts of a source: one, or two of a gallery under backfill, the old one first."""
    if not isinstance(source, EmbeddingStore | Gallery):
        raise ConfigError(f"give an EmbeddingStore or a Gallery, not a {type(source).__name__}")
    if len(source) == 0:
        raise StoreError(f"{source!r} has no items; add some first")
    if isinstance(source, EmbeddingStore):
        return (Portion(source, source.space, source.dim, len(source)),)
    return tuple(Portion(source, each.space, each.dim, each.count, each.name) for each in source.parts)


def portion(source: Source, part: str | None = None) -> Portion:
    """Find the named part of a source, or the only one with items."""
    there = [each for each in portions(source) if each.count]
    chosen = [each for each in there if part is None or each.part == part]
    if len(chosen) != 1:
        listed = " and ".join(f"{each.count} items in {each.part!r}" for each in there)
        raise DataError(f"{source!r} has {listed}; name one of these parts, got {part!r}")
    return chosen[0]
