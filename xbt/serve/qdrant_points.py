"""Points of a collection: written in batches, found again by their items' ids, and searched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.serve.optional import optional
from xbt.serve.qdrant_collection import Part
from xbt.serve.qdrant_connection import asking, is_local, point_id

ID = "id"
"""Key of a point's payload that holds its item's id; the metadata's columns stand beside it."""
BATCH = 256
"""Points in one request."""
QUERIES = 64
"""Queries in one request."""

Found = list[tuple[list[str], NDArray[np.float32]]]
"""For every query the ids that were found, and their scores, descending."""


def slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count`` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def present(client: Any, collection: str, ids: Sequence[str]) -> set[str]:
    """Which of the items are in a collection."""
    found: set[str] = set()
    for part in slices(len(ids), BATCH * 4):
        names = {point_id(item): item for item in ids[part]}
        with asking(f"look for items in {collection!r}"):
            records = client.retrieve(collection, list(names), with_payload=False, with_vectors=False)
        found |= {names[str(record.id)] for record in records}
    return found


def having(client: Any, collection: str, ids: Sequence[str], name: Part) -> set[str]:
    """Which of the items are in a collection and have a named vector."""
    models = optional("qdrant_client.models", "serve")
    found: set[str] = set()
    for part in slices(len(ids), BATCH * 4):
        names = {point_id(item): item for item in ids[part]}
        among = _filter(name)
        among.must.append(models.HasIdCondition(has_id=list(names)))
        with asking(f"look for vectors {name!r} in {collection!r}"):
            records, _ = client.scroll(
                collection, scroll_filter=among, limit=len(names), with_payload=False, with_vectors=False
            )
        found |= {names[str(record.id)] for record in records}
    return found


def insert(
    client: Any,
    collection: str,
    vectors: NDArray[np.float32],
    payloads: Sequence[dict[str, Any]],
    name: Part = "old",
) -> None:
    """Writes points with one named vector; one that is there is replaced with all its vectors.

    Args:
        client: The client.
        collection: The collection.
        vectors: (n, dim) rows.
        payloads: n payloads, the ids of the items among them.
        name: The named vector.
    """
    models = optional("qdrant_client.models", "serve")
    for part in slices(len(vectors), BATCH):
        points = [
            models.PointStruct(id=point_id(payload[ID]), vector={name: row.tolist()}, payload=payload)
            for row, payload in zip(vectors[part], payloads[part], strict=True)
        ]
        what = f"write {len(points)} points into {collection!r}"
        with asking(what, "check that the metadata are plain values, and that Qdrant is there"):
            client.upsert(collection, points)


def set_vectors(
    client: Any, collection: str, ids: Sequence[str], vectors: NDArray[np.float32], name: Part
) -> None:
    """Gives points that are there a named vector; their others stay."""
    models = optional("qdrant_client.models", "serve")
    for part in slices(len(ids), BATCH):
        points = [
            models.PointVectors(id=point_id(item), vector={name: row.tolist()})
            for item, row in zip(ids[part], vectors[part], strict=True)
        ]
        with asking(f"write {len(points)} vectors {name!r} into {collection!r}"):
            client.update_vectors(collection, points)


def remove(client: Any, collection: str, ids: Sequence[str]) -> None:
    """Removes points; those that are not there are no error."""
    models = optional("qdrant_client.models", "serve")
    for part in slices(len(ids), BATCH * 4):
        with asking(f"remove points from {collection!r}"):
            client.delete(collection, models.PointIdsList(points=[point_id(item) for item in ids[part]]))


def count(client: Any, collection: str, having: Part | None = None) -> int:
    """Points of a collection, all or those that have a named vector; exact."""
    condition = None if having is None else _filter(having)
    with asking(f"count the points of {collection!r}"):
        return int(client.count(collection, count_filter=condition, exact=True).count)


def nearest(
    client: Any,
    collection: str,
    queries: NDArray[np.float32],
    k: int,
    using: Part,
    without: Part | None = None,
    exact: bool = False,
) -> Found:
    """The first k points of every query that have a named vector.

    Args:
        client: The client.
        collection: The collection.
        queries: (n, dim) rows.
        k: Points per query; fewer are returned where there are not as many.
        using: The named vector.
        without: Leaves out the points that have this one.
        exact: Whether a server compares with every point, in place of its index; local mode always does.
    """
    models = optional("qdrant_client.models", "serve")
    params = models.SearchParams(exact=True) if exact and not is_local(client) else None
    condition = None if without is None else _filter(without, must_not=True)
    found: Found = []
    for part in slices(len(queries), QUERIES):
        requests = [
            models.QueryRequest(
                query=row.tolist(), using=using, limit=k, filter=condition, params=params, with_payload=[ID]
            )
            for row in queries[part]
        ]
        with asking(f"search {collection!r}"):
            responses = client.query_batch_points(collection, requests)
        for response in responses:
            scores = np.array([point.score for point in response.points], dtype=np.float32)
            found.append(([str(point.payload[ID]) for point in response.points], scores))
    return found


def _filter(name: Part, must_not: bool = False) -> Any:
    models = optional("qdrant_client.models", "serve")
    condition = [models.HasVectorCondition(has_vector=name)]
    return models.Filter(must_not=condition) if must_not else models.Filter(must=condition)
