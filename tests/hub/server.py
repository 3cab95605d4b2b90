"""A local server for the part of the Hub's API that huggingface_hub uses to push, list and pull models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one that may read and write everything, one that may read."""
_REPO = r"((?:[\w.-]+/)?[\w.-]+)"


@dataclass
class Repo:
    """A model repository: every commit is a whole tree of files.

    Attributes:
        commits: Commit → path → content.
        refs: Branch, tag or ``refs/pr/N`` → commit.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], message: str, ref: str = "main") -> str:
        seed = json.dumps([sorted(files), message, len(self.commits)]) + str(time.time_ns())
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """The server; ``with HubServer() as hub`` runs it, and ``hub.url`` is its endpoint.

    Attributes:
        repos: Every repository, by name.
        requests: Method and path of every request, in order.
        faults: Path → what to do with the next requests for it: a status to answer with, or ``"truncate"``
            to break the next download off in the middle.
        tampered: Path in a repository → content that is sent in place of the one committed.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.verified: list[str] = []
        self.faults: dict[str, list[int | str]] = {}
        self.tampered: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.resolve(revision)]

    def put(self, repo: str, files: dict[str, bytes], message: str = "by hand") -> str:
        return self.repos.setdefault(repo, Repo()).commit(files, message)

    def counts(self) -> Counter[str]:
        """How many requests of each kind there were: commits, uploads, listings, downloads, ..."""
        kinds = {
            "create": r"POST /api/repos/create",
            "commit": r"POST /api/models/.*/commit/",
            "batch": r"POST .*\.git/info/lfs/objects/batch",
            "upload": r"PUT /lfs/",
            "download": r"GET .*/resolve/",
            "head": r"HEAD .*/resolve/",
            "tree": r"GET /api/models/.*/tree/",
        }
        return Counter(
            kind for line in self.requests for kind, pattern in kinds.items() if re.match(pattern, line)
        )


class _Handler(BaseHTTPRequestHandler):
    """One request; the routes are in :meth:`_routes`."""

    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        hub, parts = self.server_hub, urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        left = next((each for key, each in hub.faults.items() if each and key in path), None)
        self.truncate = False
        if left and left[0] != "truncate":
            return self._send(left.pop(0), b"out of order", {})
        if left and self.command == "GET":
            self.truncate = bool(left.pop(0))
        for pattern, call in self._routes():
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return call(*match.groups())
        return self._error(404, "EntryNotFound", f"no route {self.command} {path}")

    def _routes(self):
        return [
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
            (rf"POST /api/models/{_REPO}/branch/(.+)", self._branch),
            (rf"POST /api/models/{_REPO}/preupload/(.+)", self._preupload),
            (rf"POST /api/models/{_REPO}/commit/(.+)", self._commit),
            (rf"POST /{_REPO}\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /lfs/(\w+)", self._upload),
            (r"POST /lfs/verify", self._verify),
            (rf"GET /api/models/{_REPO}", lambda repo: self._info(repo, "main")),
            (rf"GET /api/models/{_REPO}/revision/(.+)", self._info),
            (rf"GET /api/models/{_REPO}/tree/(.+)", self._tree),
            (rf"(GET|HEAD) /{_REPO}/resolve/(refs/pr/\d+|[^/]+)/(.+)", self._resolve),
        ]

    # Permissions

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _may_write(self) -> bool:
        if self._token() == WRITER:
            return True
        if self._token() is None:
            self._error(401, None, "Invalid username or password.")
        else:
            self._error(403, None, "Forbidden: pass a token with write access")
        return False

    def _repo(self, name: str) -> Repo | None:
        repo = self.server_hub.repos.get(name)
        if repo is None or (repo.private and self._token() not in (WRITER, READER)):
            # As on the Hub, a private repository looks like a missing one.
            self._error(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _revision(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    # Writing

    def _create(self) -> None:
        if not self._may_write():
            return None
        body = json.loads(self.body)
        name = f"{body['organization']}/{body['name']}"
        url = f"{self.server_hub.url}/{name}"
        if name in self.server_hub.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = body.get("visibility") == "private" or body.get("private") is True
        repo = self.server_hub.repos[name] = Repo(private=private)
        repo.commit({}, "initial commit")
        return self._json({"url": url, "name": name})

    def _branch(self, name: str, branch: str) -> None:
        if not self._may_write() or (repo := self._repo(name)) is None:
            return None
        if branch in repo.refs:
            return self._json({"error": "Reference already exists"}, 409)
        repo.refs[branch] = repo.refs["main"]
        return self._json({})

    def _preupload(self, name: str, revision: str) -> None:
        if not self._may_write() or (found := self._revision(name, revision)) is None:
            return
        there = found[0].commits[found[1]]
        answer = []
        for each in json.loads(self.body)["files"]:
            large = each["path"].endswith((".safetensors", ".bin"))
            old = there.get(each["path"])
            oid = None if old is None else (_sha256(old) if large else _git_oid(old))
            mode = "lfs" if large else "regular"
            answer.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _batch(self, name: str) -> None:
        if not self._may_write() or self._repo(name) is None:
            return
        hub, objects = self.server_hub, []
        for each in json.loads(self.body)["objects"]:
            entry = dict(each)
            if each["oid"] not in hub.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{hub.url}/lfs/{each['oid']}"},
                    "verify": {"href": f"{hub.url}/lfs/verify"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            return self._error(400, None, "the content is not what was announced")
        self.server_hub.blobs[oid] = self.body
        return self._json({})

    def _verify(self) -> None:
        body = json.loads(self.body)
        blob = self.server_hub.blobs.get(body["oid"])
        if blob is None or len(blob) != body["size"]:
            return self._error(404, None, "not uploaded")
        self.server_hub.verified.append(body["oid"])
        return self._json({})

    def _commit(self, name: str, revision: str) -> None:
        if not self._may_write() or (found := self._revision(name, revision)) is None:
            return
        repo, parent = found
        files, header = dict(repo.commits[parent]), {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                header = value
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.blobs[value["oid"]]
                repo.lfs.add(value["path"])
            else:
                del files[value["path"]]
        answer = {"commitUrl": "", "commitOid": ""}
        ref = revision
        if self.query.get("create_pr"):
            number = 1 + sum(each.startswith("refs/pr/") for each in repo.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server_hub.url}/{name}/discussions/{number}"
        oid = repo.commit(files, header["summary"], ref)
        answer |= {"commitUrl": f"{self.server_hub.url}/{name}/commit/{oid}", "commitOid": oid}
        self._json(answer)

    # Reading

    def _info(self, name: str, revision: str) -> None:
        if (found := self._revision(name, revision)) is None:
            return
        repo, commit = found
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        self._json(
            {"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings}
        )

    def _tree(self, name: str, revision: str) -> None:
        if (found := self._revision(name, revision)) is None:
            return
        repo, commit = found
        entries = []
        for path, content in repo.commits[commit].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if path in repo.lfs:
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, method: str, name: str, revision: str, path: str) -> None:
        if (found := self._revision(name, revision)) is None:
            return None
        repo, commit = found
        content = repo.commits[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        oid = _sha256(content) if path in repo.lfs else _git_oid(content)
        content = self.server_hub.tampered.get(path, content)
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path in repo.lfs:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        status, start = 200, re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            status, content = 206, content[int(start[1]) :]
        if self.truncate:
            # The headers promise all of it; the connection ends in the middle.
            self._send(status, content[: len(content) // 2], headers, length=len(content))
            self.close_connection = True
            return None
        return self._send(status, content, headers)

    def _json(self, data: object, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None):
        fields = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), fields)

    def _send(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
