"""Manifests: nothing in them leads out of the store, hangs, or is believed against the files."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given

from xbt.errors import StoreError
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore, find_faults
from xbt.store.layout import _checksum

VECTORS, METADATA = "text_emb/text_emb_000000.npy", "metadata/metadata_000000.parquet"


def make(path):
    """Writes a store of two shards."""
    store = EmbeddingStore.create(path, modality="text", space=EmbeddingSpace("m", 4), dtype="float32")
    store.append(np.eye(4, dtype=np.float32), list("abcd"), {"caption": list("wxyz")})
    store.append(np.eye(2, 4, dtype=np.float32), list("ef"), {"caption": ["u", "v"]})
    return path


def _manifest():
    """The manifest of the fixture's store."""
    with tempfile.TemporaryDirectory() as folder:
        return json.loads((make(Path(folder) / "store") / "manifest.json").read_text())


MANIFEST = _manifest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("layout") / "store")


@pytest.fixture
def directory(whole, tmp_path):
    return copied(whole, tmp_path / "store")


def copied(whole, to):
    for source in whole.rglob("*"):
        if source.is_file():
            target = to / source.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return to


def write(directory, manifest):
    """Writes a manifest with a checksum that agrees: anybody can compute it."""
    if isinstance(manifest, dict):
        manifest = {key: value for key, value in manifest.items() if key != "checksum"}
        with suppress(RecursionError):
            manifest = {**manifest, "checksum": _checksum(manifest)}
    (directory / "manifest.json").write_bytes(dump(manifest))


def use(directory):
    store = EmbeddingStore.open(directory)
    return store.read(), store.ids, store.metadata(), list(store.extra()), repr(store)


def set_in(manifest, place, value):
    *path, last = place
    for key in path:
        manifest = manifest[key]
    manifest[last] = value


FILE = ("shards", 0, "files")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ((*FILE, "../../../etc/hostname"), {"bytes": 0, "sha256": "0" * 64}, "must have one .npy file and"),
        ((*FILE, "text_emb/text_emb_7.npy"), {"bytes": 0, "sha256": "0" * 64}, "must have one .npy"),
        ((*FILE, VECTORS, "bytes"), float("inf"), "not valid JSON"),
        ((*FILE, VECTORS, "bytes"), -3, "bytes is -3"),
        ((*FILE, VECTORS, "sha256"), "", "is not a SHA-256"),
        (("shards", 0, "count"), 10**12, r"cannot hold 10{12} rows in the \d+ bytes"),
        (("shards", 0, "count"), -1, "count is -1"),
        (("shards", 0, "count"), True, "count is True"),
        (("shards", 0, "count"), 3.0, "count is 3.0"),
        (("shards", 0, "name"), "../0", "consists of digits and underscores"),
        (("shards", 0, "name"), "9" * 4000, "consists of digits and underscores"),
        (("shards", 1), None, "incomplete or damaged"),
        (("dim",), 0, "dimension 0 cannot belong to the space"),
        (("dim",), 10**400, "dim is 10"),
        (("space", "dim"), float("nan"), "not valid JSON"),
        (("space", "dim"), 3, "cannot belong to the space"),
        (("space", "model"), "caf\ud800", "incomplete or damaged"),
        (("space", "revision"), 7, "revision of a space must be text"),
        (("space", "probe"), "!", "probe of a space is damaged"),
        (("space", "probe"), "", "probe of a space is empty or not finite"),
        (("modality",), "image", "lacks img_emb"),
        (("extra",), {"bytes": 3}, "incomplete or damaged"),
    ],
)
def test_what_no_manifest_says_is_refused(directory, place, value, words):
    manifest = json.loads((directory / "manifest.json").read_text())
    set_in(manifest, place, value)
    write(directory, manifest)
    with pytest.raises(StoreError, match=words):
        use(directory)
    assert len(find_faults(directory)) == 1


def test_a_shard_twice_is_refused(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"][1] = manifest["shards"][0]
    write(directory, manifest)
    with pytest.raises(StoreError, match="not in order, or one occurs twice"):
        EmbeddingStore.open(directory)


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither pipes with names nor these devices")
@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "link out", "link to nothing"])
@pytest.mark.parametrize("name", [VECTORS, METADATA, "manifest.json"])
@pytest.mark.parametrize("manifest", [True, False])
def test_only_regular_files_within_the_store_are_opened(directory, tmp_path, kind, name, manifest):
    if not manifest:
        (directory / "manifest.json").unlink()
    path = directory / name
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link out": outside}.get(kind, tmp_path / "nothing"))
    if name == "manifest.json" and not manifest:
        return  # there was none, and what is no file is none
    assert find_faults(directory)
    with pytest.raises(StoreError):
        use(directory)


def test_a_link_within_the_store_is_followed(directory):
    path = directory / VECTORS
    path.rename(directory / "elsewhere.npy")
    path.symlink_to(directory / "elsewhere.npy")
    assert use(directory)[1] == list("abcdef")


@pytest.mark.parametrize(
    "line", [b"5", b"{x}", b"[" * 100_000, b'{"name": "0"}', b'{"name": 3, "extra": {}}', b'{"name": "\xff"}']
)
def test_a_damaged_note_is_named(directory, line):
    good = b'{"name": "000000", "extra": {"a": 1}}\n'
    (directory / "extra.jsonl").write_bytes(good + line + b"\n")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["extra"] = {"bytes": len(good + line) + 1, "sha256": "0" * 64}
    write(directory, manifest)
    notes = EmbeddingStore.open(directory).extra()
    assert next(notes) == ("000000", {"a": 1})
    with pytest.raises(StoreError, match=r"line 2 of .*extra.jsonl is damaged"):
        next(notes)


@pytest.fixture(scope="module")
def scratch(whole, tmp_path_factory):
    return copied(whole, tmp_path_factory.mktemp("fuzz") / "store")


@fuzzed
@given(data=damaged_json(MANIFEST))
def test_fuzz_manifest(scratch, data):
    write(scratch, data)
    loads_or_refuses(lambda: use(scratch))
    loads_or_refuses(lambda: find_faults(scratch))


@fuzzed
@given(data=damaged(dump(MANIFEST)))
def test_fuzz_manifest_bytes(scratch, data):
    (scratch / "manifest.json").write_bytes(data)
    loads_or_refuses(lambda: use(scratch))
