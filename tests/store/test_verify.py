from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from xbt.errors import StoreError
from xbt.store import EmbeddingStore, StoreBuilder, find_faults


@pytest.fixture
def directory(tmp_path, space, unit_rows):
    """A finished store of three shards with notes beside one of them."""
    builder = StoreBuilder(tmp_path / "store", modality="image", space=space)
    builder.prepare()
    for number, count in enumerate((3, 0, 5)):
        names = [f"{number}-{row}" for row in range(count)]
        extra = {"rejected": ["x.jpg"]} if number == 2 else None
        builder.write(str(number), unit_rows(count, number), names, {"image_path": names}, extra)
    builder.finish(["0", "1", "2"])
    return tmp_path / "store"


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_sound_store_has_no_faults(directory):
    assert len(files_of(directory)) == 8
    assert find_faults(directory) == []
    EmbeddingStore.open(directory).verify()


def test_a_flipped_bit_in_any_file_is_found(directory):
    generator = np.random.default_rng(0)
    for path in files_of(directory):
        whole = path.read_bytes()
        places = {0, len(whole) - 1, *generator.integers(0, len(whole), 12).tolist()}
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(flipped)
            faults = find_faults(directory)
            assert len(faults) == 1, (path, place)
            assert str(path) in faults[0]
            assert "again" in faults[0] or "install a newer xbt" in faults[0]
        path.write_bytes(whole)
    assert find_faults(directory) == []


def test_a_flipped_bit_keeps_its_size_so_only_verify_finds_it(directory):
    path = directory / "img_emb" / "img_emb_2.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = EmbeddingStore.open(directory)
    with pytest.raises(
        StoreError, match=r"1 faults: .*img_emb_2.npy of shard '2' has other bytes than were wri"
    ):
        store.verify()


@pytest.mark.parametrize("name", ["img_emb/img_emb_2.npy", "metadata/metadata_0.parquet"])
def test_files_of_the_wrong_size_are_refused_at_once(directory, name):
    whole = (directory / name).read_bytes()
    for content in (b"", whole[:1], whole[:60], whole[:-1], whole + b"\0", None):
        (directory / name).unlink()
        if content is not None:
            (directory / name).write_bytes(content)
        words = "is missing" if content is None else f"has {len(content)} bytes instead of {len(whole)}"
        with pytest.raises(StoreError, match=rf"{name} of shard '\d' {words}: copy it again"):
            EmbeddingStore.open(directory)
        assert len(find_faults(directory)) == 1
        (directory / name).write_bytes(whole)
    EmbeddingStore.open(directory)


def test_every_fault_is_reported_even_to_who_has_the_store_open(directory):
    store = EmbeddingStore.open(directory)
    (directory / "img_emb" / "img_emb_0.npy").unlink()
    with (directory / "metadata" / "metadata_2.parquet").open("ab") as file:
        file.write(b"more")
    (directory / "extra.jsonl").write_text("changed")
    with pytest.raises(
        StoreError, match=r"3 faults: .*img_emb_0.npy.*; .*metadata_2.parquet.*; .*extra.jsonl"
    ):
        store.verify()
    with pytest.raises(StoreError, match=r"img_emb_0.npy.*2 files are wrong: see xbt.store.find_faults"):
        EmbeddingStore.open(directory)


def test_manifests_that_cannot_be_used(directory):
    path = directory / "manifest.json"
    whole = json.loads(path.read_text())
    for content, words in (
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        (
            json.dumps({**whole, "version": 2}),
            r"version 2 of the format.*reads version 1; install a newer xbt",
        ),
        (json.dumps({**whole, "format": "parquet"}), "its format is 'parquet', not 'xbt-store'"),
        (json.dumps({**whole, "count": 9}), "was edited or damaged"),
        (json.dumps({k: v for k, v in whole.items() if k != "shards"}), "was edited or damaged"),
        (json.dumps({k: v for k, v in whole.items() if k != "checksum"}), "is incomplete or damaged"),
    ):
        path.write_text(content)
        with pytest.raises(StoreError, match=words):
            EmbeddingStore.open(directory)
        assert len(find_faults(directory)) == 1


def test_a_file_cut_while_the_store_is_open_is_noticed(directory):
    store = EmbeddingStore.open(directory)
    store.rows([0])
    path = directory / "img_emb" / "img_emb_0.npy"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(StoreError, match=r"img_emb_0.npy has \d+ bytes, but its 3 rows need"):
        store.rows([2])
    shutil.copy(directory / "img_emb" / "img_emb_2.npy", directory / "img_emb" / "img_emb_0.npy")
    fresh = EmbeddingStore.open
    with pytest.raises(StoreError, match="bytes instead of"):
        fresh(directory)
