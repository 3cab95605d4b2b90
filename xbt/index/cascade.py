"""Cascade: any query finds candidates, and the new model's own scores order them.

The first stage searches the vectors that all rows have, with whatever query was chosen for them: that of the
old model, a projected new one, or a mixture. The first K candidates are then ordered by the new model. A
candidate without a new vector gets it there and then from its original
(:class:`~xbt.index.on_demand.Embedder`), and keeps it: what searches embed *is* the backfill, and
:func:`~xbt.backfill.run_backfill` continues it.

A cascade ranks as well as the new model alone if the first K hold what the new model would put first
(Matveeva et al., "High accuracy retrieval with multiple nested ranker", SIGIR 2006; Wang, Lin & Metzler, "A
cascade ranking model for efficient ranked retrieval", SIGIR 2011). :func:`~xbt.evaluation.depth_curve`
measures which K that is.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError
from xbt.index.mixed import require_same_count
from xbt.index.on_demand import (
    CascadeStatistics,
    Embedder,
    Embeds,
    Modality,
    Originals,
    Source,
    fetch_present,
)
from xbt.index.protocol import Hits, IndexInfo, VectorIndex
from xbt.index.target import begin, is_complete, vector_names
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_k, as_queries

QUERIES_AT_ONCE = 256
"""Queries whose candidates are held at once."""


class Cascade:
    """Second stage of a search: the new model scores the first candidates.

    One cascade serves one index, for as many threads as search it. Its threads start with the first search. A
    row whose original is missing or broken is not tried again before :meth:`refresh`.

    Args:
        new: The new model, or anything with ``space``, ``encode_images`` and ``encode_texts``.
        originals: See :class:`~xbt.index.on_demand.Originals`.
        depth: Candidates of each query that the new model scores, K.
        time_limit: Seconds per query to wait for originals; n queries at once wait n times as long.
            Candidates that are not ready by then keep their place. ``None`` waits for all.
        modality: ``"image"``, or ``"text"`` for an index of texts.
        workers: Threads that read and decode originals. One that hangs blocks its thread.
        batch_size: Maximum originals per forward pass and write.

    Raises:
        ConfigError: If an argument is out of range, or the originals are no source.

    Example:
        >>> cascade = Cascade(new, "photos/", depth=20, time_limit=0.5)
        >>> old_queries, new_queries = upgraded.encode_texts(texts), new.encode_texts(texts)
        >>> gallery.search(old_queries, k=10, rerank=cascade, new_queries=new_queries).ids
        >>> cascade.statistics.hit_rate
    """

    def __init__(
        self,
        new: Embeds,
        originals: Source,
        *,
        depth: int = 20,
        time_limit: float | None = None,
        modality: Modality = "image",
        workers: int = 4,
        batch_size: int = 16,
    ) -> None:
        for name, value in (("depth", depth), ("workers", workers), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}, but must be an integer of at least 1")
        if time_limit is not None and not time_limit >= 0:
            raise ConfigError(f"time_limit is {time_limit!r}; give seconds of at least 0, or None to wait")
        self.new, self.depth, self.time_limit = new, depth, time_limit
        self._originals = Originals(originals, modality)
        self._workers, self._batch_size = workers, batch_size
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._embedder: Embedder | None = None

    @property
    def statistics(self) -> CascadeStatistics:
        """Counts so far."""
        with self._lock:
            embedded = 0 if self._embedder is None else self._embedder.embedded
            return CascadeStatistics(**self._counts, embedded=embedded)

    def search(
        self, index: VectorIndex, old_queries: Vectors, new_queries: Vectors | None, k: int, **options: Any
    ) -> Hits:
        """Search an index through the cascade, as its ``search(..., rerank=)`` does.

        Arguments and errors are those of :func:`cascaded_search`.

        Raises:
            ConfigError: If there are no new queries, or the search is restricted to one vector.
        """
        named = [name for name in ("part", "using", "without") if options.pop(name, None) is not None]
        if named or new_queries is None:
            wrong = f"{named[0]}= was given" if named else "new_queries= is missing"
            raise ConfigError(
                f"rerank= searches both vectors, but {wrong}; give the queries of both models, and no vector"
            )
        return cascaded_search(index, old_queries, new_queries, k, self, **options)

    def refresh(self) -> None:
        """Try originals again that were missing or broken."""
        if self._embedder is not None:
            self._embedder.retry()

    def prewarm(
        self, index: VectorIndex, old_queries: Vectors, budget: int | None = None, **options: Any
    ) -> int:
        """Embed the candidates of a query log, those of most queries first, without a time limit.

        Args:
            index: The index.
            old_queries: (n, old_dim) queries of the log for the first stage, repeated as often as they were
                asked.
            budget: Maximum number of originals to embed.
            **options: Further arguments of :meth:`VectorIndex.search`, such as ``filter``.

        Returns:
            Number of originals that were embedded.

        Raises:
            XbtError: As :func:`cascaded_search`.
        """
        info = index.info()
        if _is_complete(index, info, self.new.space):
            return 0
        embedder = self.embedder_of(index)
        old, new = embedder.names
        asked: Counter[str] = Counter()
        for start in range(0, len(old_queries), QUERIES_AT_ONCE):
            some = old_queries[start : start + QUERIES_AT_ONCE]
            lacking = index.search(some, self.depth, using=old, without=new, **options)
            first = index.search(some, self.depth, using=old, **options)
            for line, without in zip(first.ids, map(set, lacking.ids), strict=True):
                asked.update(item for item in line if item in without)
        chosen = [item for item, _ in asked.most_common(budget)]
        before = embedder.embedded
        for start in range(0, len(chosen), QUERIES_AT_ONCE):
            embedder.embed(chosen[start : start + QUERIES_AT_ONCE])
        return embedder.embedded - before

    def close(self) -> None:
        """Wait for the originals that are being embedded, and end the threads; a search starts them again."""
        if self._embedder is not None:
            self._embedder.close()

    def embedder_of(self, index: VectorIndex) -> Embedder:
        """Start the threads for an index, and declare its new vector, unless that was done.

        Raises:
            ConfigError: If the cascade serves another index.
            XbtError: If the index cannot be written to, or has new vectors of another space.
        """
        with self._lock:
            known = self._embedder
            if known is not None and known.index is not index:
                raise ConfigError("the cascade serves another index; make one for each index")
            if known is None or known.closed or known.pid != os.getpid():  # a forked child has no threads
                names = vector_names(index)
                begin(index, names[1], self.new.space)
                made = Embedder(index, names, self.new, self._originals, self._workers, self._batch_size)
                if known is not None:
                    made.embedded, made.failed = known.embedded, known.failed
                known = self._embedder = made
            return known

    def count(self, queries: int, outcomes: Mapping[str, int]) -> None:
        """Add the outcomes of the candidates of some queries to the statistics."""
        with self._lock:
            self._counts["queries"] += queries
            self._counts.update(outcomes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cascaded_search(
    index: VectorIndex,
    old_queries: Vectors,
    new_queries: Vectors,
    k: int,
    cascade: Cascade,
    *,
    first: Hits | None = None,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
    **options: Any,
) -> Hits:
    """Search with the old queries, and order the first candidates by the new model.

    The candidates of a query are the first K rows of the first stage, and the first k rows among those that
    have a new vector already, by the new query. They are ordered as follows:

    * A row of the first stage without a new vector (missing, broken or late) keeps its place.
    * The candidates with a new vector take the other places, by their score under the new model. Equal scores
      keep the order of the first stage.
    * The rows of the first stage beyond K follow, in its order.

    Where every row has a new vector, this is the search of the new model alone.

    Args:
        index: An index whose first vector is the old model's. The new vector is declared unless it is there.
        old_queries: (n, old_dim) queries for the first stage, in the old space.
        new_queries: (n, new_dim) the same queries under the new model.
        k: Rows per query; fewer are returned where there are fewer.
        cascade: The second stage.
        first: Result of another first stage, of max(k, K) rows per query, such as one with biases; by default
            the old queries search the old vectors.
        old_space: Space of the old queries, checked where it is given.
        new_space: Space of the new queries, likewise.
        **options: Further arguments of :meth:`VectorIndex.search`, such as ``filter``.

    Returns:
        Ids, and inner products under the new model. A row without a new vector has the score of the row
        before it, or at the top of the row after it. If no result of a query has one, the scores are those of
        the first stage.

    Raises:
        DataError: If the index is empty, there are not as many old queries as new ones, k is below 1, or a
            value is NaN.
        SpaceMismatchError: If the space or the dimension of queries is another, or the index has new vectors
            of another space.
        StoreError: If the index cannot be written to.
    """
    info, k = index.info(), as_k(k)
    if not info.count:
        raise DataError("the index is empty; add items before searching it")
    if new_space is not None:
        cascade.new.space.require(new_space, "the new queries")
    new_rows = as_queries(new_queries, "the new queries", cascade.new.space.dim)
    old, *_ = info.vectors
    if _is_complete(index, info, cascade.new.space):
        return index.search(new_rows, k, using=old, **options)
    old_rows = as_queries(old_queries, "the old queries", info.vectors[old].dim)
    require_same_count(old_rows, new_rows)
    known = info.vectors[old].space
    if known is not None and old_space is not None:
        known.require(old_space, "the old queries")
    stage = _Stage(index, cascade, cascade.embedder_of(index), k, options)
    lines: list[tuple[list[str], NDArray[np.float32]]] = []
    for start in range(0, len(old_rows), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        given = None if first is None else Hits(first.ids[part], first.scores[part])
        lines += stage.search(old_rows[part], new_rows[part], given)
    scores = np.full((len(lines), max(len(ids) for ids, _ in lines)), -np.inf, np.float32)
    for row, (_, values) in enumerate(lines):
        scores[row, : len(values)] = values
    return Hits([ids for ids, _ in lines], scores)


def reranked(
    first: Sequence[str], others: Sequence[str], scores: Mapping[str, float], depth: int
) -> list[str]:
    """Order one query's candidates, and the other rows of the first stage; see :func:`cascaded_search`.

    ``first`` holds rows of the first stage and ``others`` further candidates, best first; ``scores`` are
    those under the new model, by id. The first ``depth`` rows of the first stage are candidates.
    """
    head = first[:depth]
    candidates = [item for item in dict.fromkeys([*head, *others]) if item in scores]
    candidates.sort(key=lambda item: -scores[item])
    line = candidates
    for place, item in enumerate(head):
        if item not in scores:
            line.insert(place, item)  # from the top on: those before it are in place
    placed = set(line)
    return line + [item for item in first[depth:] if item not in placed]


@dataclass(frozen=True)
class _Stage:
    """One search through a cascade."""

    index: VectorIndex
    cascade: Cascade
    embedder: Embedder
    k: int
    options: Mapping[str, Any]

    def search(
        self, old_queries: NDArray[np.float32], new_queries: NDArray[np.float32], first: Hits | None
    ) -> list[tuple[list[str], NDArray[np.float32]]]:
        """Ids and scores of every query."""
        (old, new), depth = self.embedder.names, self.cascade.depth
        if first is None:
            first = self.index.search(old_queries, max(self.k, depth), using=old, **self.options)
        heads = [ids[:depth] for ids in first.ids]
        vectors = self._embedded(old_queries, heads)
        others = self.index.search(new_queries, self.k, using=new, **self.options).ids
        more = dict.fromkeys(item for line in others for item in line if item not in vectors)
        vectors |= fetch_present(self.index, list(more), new)
        return [self._line(first, row, others[row], vectors, query) for row, query in enumerate(new_queries)]

    def _embedded(
        self, old_queries: NDArray[np.float32], heads: Sequence[Sequence[str]]
    ) -> dict[str, NDArray[np.float32]]:
        """New vectors of the candidates; those without one are embedded, as far as time allows."""
        embedder, name = self.embedder, self.embedder.names[1]
        by_place = zip_longest(*heads)  # the first candidates of all queries, then the second ones, and so on
        ids = list(dict.fromkeys(item for place in by_place for item in place if item is not None))
        lacking = self._lacking(old_queries, heads)
        there = [item for item in ids if item not in lacking]
        vectors = fetch_present(self.index, there, name)
        embedder.known(vectors, [item for item in there if item not in vectors])  # rolled back, or replaced
        hits = set(vectors)
        limit = self.cascade.time_limit
        seconds = None if limit is None else limit * len(heads)
        outcomes = embedder.embed((item for item in ids if item not in hits), seconds)
        vectors |= fetch_present(
            self.index, [item for item, outcome in outcomes.items() if outcome == "stored"], name
        )
        counted: Counter[str] = Counter(
            "hits" if item in hits else outcomes[item] for head in heads for item in head
        )
        del counted["stored"]
        counted["candidates"] = sum(map(len, heads))
        self.cascade.count(len(heads), counted)
        return vectors

    def _lacking(self, old_queries: NDArray[np.float32], heads: Sequence[Sequence[str]]) -> set[str]:
        """Candidates without a new vector, as far as the index says so."""
        stored, failed = self.embedder.stored, self.embedder.failed
        unknown = [
            row
            for row, head in enumerate(heads)
            if any(item not in stored and item not in failed for item in head)
        ]
        lacking = {item for head in heads for item in head if item in failed}
        if unknown:
            self.embedder.see_other_writers()
            old, new = self.embedder.names
            found = self.index.search(
                old_queries[unknown], self.cascade.depth, using=old, without=new, **self.options
            )
            lacking.update(item for line in found.ids for item in line)
        return lacking

    def _line(
        self,
        first: Hits,
        row: int,
        others: Sequence[str],
        vectors: Mapping[str, NDArray[np.float32]],
        query: NDArray[np.float32],
    ) -> tuple[list[str], NDArray[np.float32]]:
        ids, depth = first.ids[row], self.cascade.depth
        scored = [item for item in dict.fromkeys([*ids[:depth], *others]) if item in vectors]
        scores: dict[str, float] = {}
        if scored:
            products = np.multiply(np.stack([vectors[item] for item in scored]), query, dtype=np.float64)
            scores = dict(zip(scored, products.sum(axis=1).astype(np.float32).tolist(), strict=True))
        line = reranked(ids, others, scores, depth)[: self.k]
        values = np.array([scores.get(item, np.nan) for item in line], np.float32)
        known = np.flatnonzero(~np.isnan(values))
        if not len(known):
            return line, first.scores[row, : len(line)]
        before = known[np.maximum(np.searchsorted(known, np.arange(len(line)), side="right") - 1, 0)]
        return line, values[before]


def _is_complete(index: VectorIndex, info: IndexInfo, space: EmbeddingSpace) -> bool:
    return len(info.vectors) == 1 and is_complete(index, space)
