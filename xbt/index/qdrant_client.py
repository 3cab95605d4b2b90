"""Requests to Qdrant: connections, collections that know their spaces, and points by their items' ids."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError, StoreError, XbtError
from xbt.index.protocol import Hits
from xbt.optional import optional
from xbt.space import EmbeddingSpace

NAMESPACE = uuid.UUID("7d0f7c5e-64a1-5f0b-9d0e-2b1f0a3c9e11")
"""Namespace of the points' ids; another one would give every item another point."""
ID = "id"
"""Key of a point's payload for its item's id; the metadata's columns are beside it."""
TIMEOUT = 60
"""Seconds that a server has for one request; the client's own 5 are short for a batch of vectors."""
BATCH = 256
"""Points in one request."""
QUERIES = 64
"""Queries in one request."""

FORMAT = 2
_FORMAT_KEY, _VECTORS_KEY = "xbt_format", "xbt_vectors"
DISTANCES = ("dot", "cosine")


def point_id(item: str) -> str:
    """The point of an item: Qdrant takes integers and UUIDs, so a string gets its UUID of version 5."""
    return str(uuid.uuid5(NAMESPACE, item))


# -- connections ---------------------------------------------------------------------------------------


def connect(location: Any, options: dict[str, Any]) -> Any:
    """Make a client for a location, or return the client that it is.

    Args:
        location: ``":memory:"``, the URL of a server, a folder for Qdrant's local mode (which unpickles its
            files: open only your own folders), or a ``QdrantClient``.
        options: Further arguments of ``QdrantClient``, such as ``api_key``.
    """
    qdrant = optional("qdrant_client", "serve")
    if isinstance(location, qdrant.QdrantClient):
        if options:
            raise StoreError(
                f"{', '.join(options)} cannot be given beside a client; make the client with them"
            )
        return location
    text = str(location)
    with asking(f"open {text}", "check the location, and that nobody else has the folder open"):
        if text == ":memory:":
            return qdrant.QdrantClient(text, **options)
        if "://" in text:
            return qdrant.QdrantClient(url=text, **{"timeout": TIMEOUT, **options})
        return qdrant.QdrantClient(path=str(Path(text).expanduser()), **options)


def is_local(client: Any) -> bool:
    """Check if a client is Qdrant's local mode, which searches exactly and takes no search parameters."""
    local = optional("qdrant_client.local.qdrant_local", "serve")
    return isinstance(client._client, local.QdrantLocal)


@contextmanager
def asking(what: str, fix: str = "check the name, and that Qdrant is there") -> Iterator[None]:
    """Turn errors of Qdrant, its client or the network into a ``StoreError``: what was asked, and a fix."""
    http = optional("qdrant_client.http.exceptions", "serve").ApiException
    other = optional("qdrant_client.common.client_exceptions", "serve").QdrantException
    rpc = optional("grpc", "serve").RpcError
    local = (sqlite3.Error, ValueError, RuntimeError, KeyError, TypeError, OSError)
    try:
        yield
    except XbtError:
        raise
    except (http, other, rpc, *local) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"Qdrant could not {what}: {reason}; {fix}") from error


# -- collections ---------------------------------------------------------------------------------------


def make_collection(
    client: Any,
    name: str,
    spaces: Mapping[str, EmbeddingSpace],
    distance: str,
    vector_options: dict[str, Any],
) -> None:
    """Create a collection with one named vector a space, the oldest first; its metadata keep the spaces.

    ``vector_options`` are further arguments of Qdrant's ``VectorParams``, such as ``on_disk``.
    """
    models = optional("qdrant_client.models", "serve")
    if distance not in DISTANCES:
        raise ConfigError(f"the distance of a collection is 'dot' or 'cosine', got {distance!r}")
    metric = models.Distance.DOT if distance == "dot" else models.Distance.COSINE
    with asking(f"create the collection {name!r}"):
        if client.collection_exists(name):
            raise StoreError(
                f"there is a collection or an alias {name!r} already; open it, or choose another name"
            )
        client.create_collection(
            name,
            vectors_config={
                vector: models.VectorParams(size=space.dim, distance=metric, **vector_options)
                for vector, space in spaces.items()
            },
            metadata={_FORMAT_KEY: FORMAT, **_metadata(spaces)},
        )
        if client.get_collection(name).config.metadata is None:
            client.delete_collection(name)
            raise StoreError(
                f"this Qdrant keeps no metadata of collections, so {name!r} could not remember which model "
                "made its vectors; use a server of version 1.16 or later"
            )


def read_collection(client: Any, name: str) -> tuple[dict[str, EmbeddingSpace], str]:
    """Read the spaces of a collection's named vectors, the oldest first, and its distance."""
    with asking(f"open the collection {name!r}"):
        if not client.collection_exists(name):
            there = ", ".join(repr(each.name) for each in client.get_collections().collections)
            raise StoreError(
                f"Qdrant has no collection or alias {name!r}, it has {there or 'none'}; create it first"
            )
        config = client.get_collection(name).config
    metadata = config.metadata or {}
    if metadata.get(_FORMAT_KEY) != FORMAT:
        raise StoreError(
            f"the collection {name!r} does not say which models made its vectors (its format is "
            f"{metadata.get(_FORMAT_KEY)!r}, not {FORMAT}); create one with QdrantIndex.create and "
            "upload again"
        )
    try:
        spaces = {
            str(entry["name"]): EmbeddingSpace.from_dict(entry["space"]) for entry in metadata[_VECTORS_KEY]
        }
        distance = str(next(config.params.vectors[vector].distance for vector in spaces)).rpartition(".")[2]
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise StoreError(
            f"the spaces in the metadata of the collection {name!r} are damaged ({error!r}); create it again"
        ) from error
    return spaces, distance.lower()


def add_vector(client: Any, name: str, vector: str, spaces: Mapping[str, EmbeddingSpace]) -> None:
    """Give a collection a further named vector, with the same distance as the first one.

    ``spaces`` are those of all vectors, the new one last. Only servers from version 1.18 on can do this.
    """
    models = optional("qdrant_client.models", "serve")
    with asking(f"add the vector {vector!r} to the collection {name!r}"):
        vectors = client.get_collection(name).config.params.vectors
        metric = vectors[next(iter(spaces))].distance
        if vector not in vectors:  # a killed call may have left it
            dense = models.DenseVectorConfig(size=spaces[vector].dim, distance=metric)
            client.create_vector_name(name, vector, models.DenseVectorNameConfig(dense=dense))
        client.update_collection(name, metadata=_metadata(spaces))


def drop_vector(client: Any, name: str, vector: str, spaces: Mapping[str, EmbeddingSpace]) -> None:
    """Delete a named vector, and keep the ``spaces`` of the others; takes a server from version 1.18 on."""
    with asking(f"drop the vector {vector!r} of the collection {name!r}"):
        client.update_collection(name, metadata=_metadata(spaces))
        client.delete_vector_name(name, vector)


def _metadata(spaces: Mapping[str, EmbeddingSpace]) -> dict[str, Any]:
    # A list, because a server need not keep the order of keys.
    return {_VECTORS_KEY: [{"name": name, "space": space.to_dict()} for name, space in spaces.items()]}


def resolve(client: Any, name: str) -> str:
    """The collection behind an alias; another name is returned as it is."""
    with asking(f"look up the alias {name!r}"):
        aliases = {str(each.alias_name): str(each.collection_name) for each in client.get_aliases().aliases}
    return aliases.get(name, name)


def point_alias(client: Any, alias: str, collection: str) -> str | None:
    """Let an alias name a collection, in one step with taking it from another, which is returned."""
    models = optional("qdrant_client.models", "serve")
    before = resolve(client, alias)
    steps = [
        models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)),
        models.CreateAliasOperation(
            create_alias=models.CreateAlias(alias_name=alias, collection_name=collection)
        ),
    ]
    known = before != alias
    with asking(f"let the alias {alias!r} name the collection {collection!r}"):
        client.update_collection_aliases(change_aliases_operations=steps if known else steps[1:])
    return before if known else None


# -- points --------------------------------------------------------------------------------------------


def slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count`` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def present(client: Any, collection: str, ids: Sequence[str], vector: str | None = None) -> set[str]:
    """The items among these that are in a collection, or have a named vector there."""
    models = optional("qdrant_client.models", "serve")
    there: set[str] = set()
    for part in slices(len(ids), BATCH * 4):
        names = {point_id(item): item for item in ids[part]}
        plain: dict[str, Any] = {"with_payload": False, "with_vectors": False}
        with asking(f"look for items in {collection!r}"):
            if vector is None:
                records = client.retrieve(collection, list(names), **plain)
            else:
                among = condition(vector, also=models.HasIdCondition(has_id=list(names)))
                records, _ = client.scroll(collection, scroll_filter=among, limit=len(names), **plain)
        there |= {names[str(record.id)] for record in records}
    return there


def insert(
    client: Any, collection: str, vectors: NDArray[np.float32], payloads: Sequence[dict[str, Any]], name: str
) -> None:
    """Write points with one named vector; one that is there is replaced with all its vectors.

    Each payload holds the id of its item.
    """
    models = optional("qdrant_client.models", "serve")
    for part in slices(len(vectors), BATCH):
        points = [
            models.PointStruct(id=point_id(payload[ID]), vector={name: row.tolist()}, payload=payload)
            for row, payload in zip(vectors[part], payloads[part], strict=True)
        ]
        what = f"write {len(points)} points into {collection!r}"
        with asking(what, "check that the metadata are plain values, and that Qdrant is there"):
            client.upsert(collection, points, wait=True)


def set_vectors(
    client: Any, collection: str, ids: Sequence[str], vectors: NDArray[np.float32], name: str
) -> None:
    """Give existing points a named vector; their other vectors stay."""
    models = optional("qdrant_client.models", "serve")
    for part in slices(len(ids), BATCH):
        points = [
            models.PointVectors(id=point_id(item), vector={name: row.tolist()})
            for item, row in zip(ids[part], vectors[part], strict=True)
        ]
        with asking(f"write {len(points)} vectors {name!r} into {collection!r}"):
            client.update_vectors(collection, points, wait=True)


def remove(client: Any, collection: str, ids: Sequence[str]) -> None:
    """Remove points; those that are not there are no error."""
    models = optional("qdrant_client.models", "serve")
    for part in slices(len(ids), BATCH * 4):
        with asking(f"remove points from {collection!r}"):
            client.delete(collection, models.PointIdsList(points=[point_id(item) for item in ids[part]]))


def count(client: Any, collection: str, having: str | None = None, without: str | None = None) -> int:
    """Exact number of points: all, or those with or without a named vector."""
    with asking(f"count the points of {collection!r}"):
        return int(client.count(collection, count_filter=condition(having, without), exact=True).count)


def scroll(
    client: Any, collection: str, having: str | None, without: str | None, size: int
) -> Iterator[tuple[list[str], NDArray[np.float32] | None]]:
    """Iterate over the points, ``size`` at a time, with the vector ``having`` and without ``without``."""
    offset: Any = None
    while True:
        with asking(f"read {collection!r}"):
            records, offset = client.scroll(
                collection,
                scroll_filter=condition(having, without),
                limit=size,
                offset=offset,
                with_payload=[ID],
                with_vectors=[having] if having else False,
            )
        ids = [str(record.payload[ID]) for record in records]
        if ids:
            yield ids, None if having is None else _rows(records, having)
        if offset is None:
            return


def fetch(client: Any, collection: str, ids: Sequence[str], name: str, dim: int) -> NDArray[np.float32]:
    """Read a named vector of items, in the order asked for: (n, dim) float32."""
    rows = np.empty((len(ids), dim), np.float32)
    for part in slices(len(ids), BATCH):
        with asking(f"read vectors {name!r} of {collection!r}"):
            records = client.retrieve(
                collection, [point_id(item) for item in ids[part]], with_payload=False, with_vectors=[name]
            )
        vectors = {str(record.id): (record.vector or {}).get(name) for record in records}
        for row, item in enumerate(ids[part], start=part.start):
            vector = vectors.get(point_id(item))
            if vector is None:
                raise DataError(
                    f"there is no item {item!r} with a vector {name!r} in {collection!r}; check the id"
                )
            rows[row] = vector
    return rows


def nearest(
    client: Any,
    collection: str,
    queries: NDArray[np.float32],
    k: int,
    using: str,
    where: Any = None,
    exact: bool = False,
) -> Hits:
    """Find the first k points of every query that have the named vector ``using`` and meet ``where``.

    ``exact`` makes a server compare with every point instead of using its index; local mode always does.
    """
    models = optional("qdrant_client.models", "serve")
    params = models.SearchParams(exact=True) if exact and not is_local(client) else None
    ids: list[list[str]] = []
    scores: list[list[float]] = []
    for part in slices(len(queries), QUERIES):
        requests = [
            models.QueryRequest(
                query=row.tolist(), using=using, limit=k, filter=where, params=params, with_payload=[ID]
            )
            for row in queries[part]
        ]
        with asking(f"search {collection!r}"):
            responses = client.query_batch_points(collection, requests)
        ids += [[str(point.payload[ID]) for point in response.points] for response in responses]
        scores += [[point.score for point in response.points] for response in responses]
    width = max(map(len, scores), default=0)
    table = np.full((len(scores), width), -np.inf, np.float32)
    for row, values in enumerate(scores):
        table[row, : len(values)] = values
    return Hits(ids, table)


def condition(having: str | None = None, without: str | None = None, also: Any = None) -> Any:
    """Make a filter: points with one named vector, without another, that meet a further condition."""
    models = optional("qdrant_client.models", "serve")
    if having is None and without is None and also is None:
        return None
    if not isinstance(also, models.Filter | models.HasIdCondition | None):
        raise ConfigError(f"filter is {also!r}; give a qdrant_client.models.Filter")
    must = [] if having is None else [models.HasVectorCondition(has_vector=having)]
    must_not = [] if without is None else [models.HasVectorCondition(has_vector=without)]
    return models.Filter(must=must + ([] if also is None else [also]), must_not=must_not)


def _rows(records: Sequence[Any], name: str) -> NDArray[np.float32]:
    return np.array([record.vector[name] for record in records], dtype=np.float32)
