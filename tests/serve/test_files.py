"""Exports under a full disk: one sentence, and nothing half-written."""

from __future__ import annotations

import multiprocessing
import resource

import pytest

from xbt.errors import StoreError
from xbt.files import whole_file
from xbt.projections import LinearProjection
from xbt.serve import PgvectorTable, export_interchange, export_onnx, export_pgvector
from xbt.store import EmbeddingStore

INSERT = PgvectorTable(statement="insert")
EXPORTS = {
    "interchange": lambda store, place: export_interchange(store, place),
    "copy": lambda store, place: export_pgvector(store, place / "gallery.sql"),
    "insert": lambda store, place: export_pgvector(store, place / "gallery.sql", INSERT),
}


def under_a_limit(name, path, place, answers):
    # A real failure of write(2): the system refuses files above the limit as it refuses them on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
    try:
        EXPORTS[name](EmbeddingStore.open(path), place)
    except StoreError as error:
        answers.put(str(error))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_full_disk_leaves_what_was_there(store, tmp_path, name):
    place = tmp_path / "out"
    EXPORTS[name](store, place)
    before = {path: path.read_bytes() for path in place.iterdir()}
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=under_a_limit, args=(name, store.path, place, answers))
    child.start()
    message = answers.get(timeout=60)
    child.join()
    assert "there is no space for" in message
    assert "(File too large" in message
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_a_model_that_cannot_be_saved_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "query.onnx").write_bytes(b"before")

    def full(self, destination, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.onnx.ONNXProgram.save", full)
    with pytest.raises(StoreError, match=r"there is no space for .*query.onnx \(No space left on device\)"):
        export_onnx(LinearProjection(3, 2), tmp_path / "query.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["query.onnx"]
    assert (tmp_path / "query.onnx").read_bytes() == b"before"


def test_a_file_is_replaced_at_the_end_alone(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("after")
        assert (tmp_path / "a.txt").read_text() == "before"
    assert (tmp_path / "a.txt").read_text() == "after"
    with pytest.raises(KeyError), whole_file(tmp_path / "a.txt") as partial:
        {"half": partial.write_text("half")}["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "after"
