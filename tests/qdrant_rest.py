"""Qdrant's REST interface in front of its local mode, as far as we use it; no socket is opened."""

from __future__ import annotations

import json
import re

import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.local.qdrant_local import QdrantLocal


class RestServer:
    """Answers requests as a server would, from a collection in memory.

    Attributes:
        requests: Method, path and body of every request.
    """

    def __init__(self) -> None:
        self.local = QdrantLocal(":memory:")
        self.requests = []

    def client(self):
        transport = httpx.MockTransport(self.answer)
        return QdrantClient(url="http://qdrant:6333", transport=transport, check_compatibility=False)

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        body = json.loads(request.content) if request.content else {}
        self.requests.append((request.method, path, body))
        for pattern, call in self._routes():
            match = re.fullmatch(pattern, f"{request.method} {path}")
            if match:
                try:
                    result = call(*match.groups(), body)
                except ValueError as error:
                    return httpx.Response(400, json={"status": {"error": str(error)}, "time": 0.0})
                return httpx.Response(200, json={"result": plain(result), "status": "ok", "time": 0.0})
        raise AssertionError(f"{request.method} {path} is not known")

    def _routes(self):
        name = r"/collections/([^/]+)"
        local, done = self.local, {"operation_id": 0, "status": "completed"}
        return [
            (f"GET {name}/exists", lambda c, b: {"exists": local.collection_exists(c)}),
            (f"GET {name}", lambda c, b: local.get_collection(c)),
            ("GET /collections", lambda b: local.get_collections()),
            ("GET /aliases", lambda b: local.get_aliases()),
            (f"PUT {name}", self._create),
            (f"PATCH {name}", lambda c, b: local.update_collection(c, metadata=b["metadata"])),
            (f"PUT {name}/vectors/([^/]+)", self._add_vector),
            ("POST /collections/aliases", self._aliases),
            (f"POST {name}/points", self._retrieve),
            (f"PUT {name}/points", lambda c, b: local.upsert(c, list_of(models.PointStruct, b)) and done),
            (f"PUT {name}/points/vectors", self._vectors),
            (f"POST {name}/points/count", lambda c, b: local.count(c, filter_of(b))),
            (f"POST {name}/points/delete", lambda c, b: local.delete(c, models.PointIdsList(**b)) and done),
            (f"POST {name}/points/query/batch", self._query),
            (f"POST {name}/points/scroll", self._scroll),
        ]

    def _create(self, name, body):
        vectors = {key: models.VectorParams(**each) for key, each in body["vectors"].items()}
        return self.local.create_collection(name, vectors, metadata=body["metadata"])

    def _add_vector(self, name, vector, body):
        config = models.DenseVectorNameConfig(**body)
        return self.local.create_vector_name(name, vector, config) and {"status": "completed"}

    def _aliases(self, body):
        actions = models.ChangeAliasesOperation(**body).actions
        taken = {each.name for each in self.local.get_collections().collections}
        for each in actions:  # a server refuses this; local mode before 1.20 does not
            made = getattr(each, "create_alias", None)
            if made is not None and made.alias_name in taken:
                raise ValueError(f"Collection {made.alias_name} already exists")
        return self.local.update_collection_aliases(actions)

    def _vectors(self, name, body):
        self.local.update_vectors(name, list_of(models.PointVectors, body))
        return {"operation_id": 0, "status": "completed"}

    def _scroll(self, name, body):
        points, following = self.local.scroll(
            name, filter_of(body), body["limit"], offset=body.get("offset"),
            with_payload=body["with_payload"], with_vectors=body["with_vector"],
        )  # fmt: skip
        return {"points": plain(points), "next_page_offset": following}

    def _retrieve(self, name, body):
        return self.local.retrieve(name, body["ids"], body["with_payload"], body["with_vector"])

    def _query(self, name, body):
        searches = [models.QueryRequest(**each) for each in body["searches"]]
        for each in searches:
            assert each.params is None or each.params.exact
            each.params = None  # local mode has nothing else and would warn
        return self.local.query_batch_points(name, searches)


def list_of(kind, body):
    return [kind(**each) for each in body["points"]]


def filter_of(body):
    return models.Filter(**body["filter"]) if body.get("filter") else None


def plain(result):
    if isinstance(result, list):
        return [plain(each) for each in result]
    return result.model_dump(mode="json") if hasattr(result, "model_dump") else result
