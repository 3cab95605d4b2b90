"""Reaching Qdrant: a server, a folder or memory; what it refuses, as one sentence."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xbt.errors import StoreError, XbtError
from xbt.serve.optional import optional

NAMESPACE = uuid.UUID("7d0f7c5e-64a1-5f0b-9d0e-2b1f0a3c9e11")
"""What the ids of points are derived from; another one would give every item another point."""

TIMEOUT = 60
"""Seconds that a server has for one request; the client's own 5 are short for a batch of vectors."""


def point_id(item: str) -> str:
    """The point of an item: Qdrant takes integers and UUIDs, so a string's is its UUID of version 5."""
    return str(uuid.uuid5(NAMESPACE, item))


def connect(location: Any, options: dict[str, Any]) -> Any:
    """A client for a location.

    Args:
        location: ``":memory:"``, the URL of a server, a folder for Qdrant's local mode (which unpickles what
            stands there: open your own folders alone), or a ``QdrantClient``, which is taken as it is.
        options: Further arguments of ``QdrantClient``, such as ``api_key``.

    Returns:
        The ``QdrantClient``.

    Raises:
        ConfigError: If qdrant-client is not installed.
        StoreError: If the folder is in use or cannot be opened, or the options do not fit.
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
    """Whether a client is Qdrant's local mode, which searches exactly and has no parameters of search."""
    local = optional("qdrant_client.local.qdrant_local", "serve")
    return isinstance(client._client, local.QdrantLocal)


@contextmanager
def asking(what: str, mend: str = "check the name, and that Qdrant is there") -> Iterator[None]:
    """Turns what Qdrant, its client or the way to it object into one sentence.

    Args:
        what: What was asked for, such as ``"create the collection 'photos'"``.
        mend: What to look into.

    Raises:
        StoreError: In place of the client's own errors.
    """
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
        raise StoreError(f"Qdrant could not {what}: {reason}; {mend}") from error
