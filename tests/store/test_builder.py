from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from xbt.errors import SpaceMismatchError, StoreError
from xbt.store import EmbeddingStore, StoreBuilder


def builder_at(path, space, **options):
    return StoreBuilder(path, **{"modality": "image", "space": space, **options})


def write_part(path, space, rows, numbers):
    builder = builder_at(path, space)
    for number in numbers:
        names = [f"{number}-{row}" for row in range(len(rows))]
        builder.write(
            f"{number:02d}", np.roll(rows, number, axis=1), names, {"caption": names}, {"rejected": [number]}
        )


def test_processes_write_one_store_together(tmp_path, space, unit_rows):
    builder = builder_at(tmp_path, space, dtype="float16")
    builder.prepare()
    rows, context = unit_rows(5), multiprocessing.get_context("fork")
    parts = [range(0, 12, 3), range(1, 12, 3), range(2, 12, 3)]
    children = [context.Process(target=write_part, args=(tmp_path, space, rows, part)) for part in parts]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert not builder.finished
    assert list(builder.committed()) == [f"{number:02d}" for number in range(12)]
    with pytest.raises(
        StoreError, match=r"is not finished: it has 12 shards; run the job that writes it again"
    ):
        EmbeddingStore.open(tmp_path)
    store = builder.finish(f"{number:02d}" for number in reversed(range(12)))
    assert builder.finished
    expected = np.concatenate([np.roll(rows, number, axis=1) for number in range(12)]).astype(np.float16)
    np.testing.assert_array_equal(store.read(), expected)
    assert store.ids == [f"{number}-{row}" for number in range(12) for row in range(5)]
    assert dict(store.extra())["07"] == {"rejected": [7]}
    assert builder.committed()["07"].extra == {"rejected": [7]}
    assert not (tmp_path / "in_progress").exists()
    store.verify()


def test_parts_and_chunks_stand_in_numerical_order(tmp_path, space, unit_rows):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    names = ["0_0", "0_2", "0_10", "1_0", "10_1", "2_1"]
    for row, name in enumerate(names):
        builder.write(name, unit_rows(1, row), [name])
    store = builder.finish(names)
    assert store.ids == ["0_0", "0_2", "0_10", "1_0", "2_1", "10_1"]
    store.append(unit_rows(1), ["next"])
    assert EmbeddingStore.open(tmp_path).ids[-1] == "next"
    assert store.shards[-1].name == "000011"


def test_a_job_run_again_writes_the_rest_and_ends_with_the_same_bytes(tmp_path, space, unit_rows):
    for name, stop in (("whole", 4), ("again", 2)):
        builder = builder_at(tmp_path / name, space)
        builder.prepare()
        for number in range(stop):
            builder.write(str(number), unit_rows(3, number), [f"{number}-{row}" for row in range(3)])
        del builder
    again = builder_at(tmp_path / "again", space)
    again.prepare()
    assert list(again.committed()) == ["0", "1"]
    with pytest.raises(StoreError, match=r"lacks 2 of 4 shards, first '2'; run the job again"):
        again.finish(map(str, range(4)))
    for number in (3, 2):
        again.write(str(number), unit_rows(3, number), [f"{number}-{row}" for row in range(3)])
    again.finish(map(str, range(4)))
    builder_at(tmp_path / "whole", space).finish(map(str, range(4)))
    assert contents_of(tmp_path / "whole") == contents_of(tmp_path / "again")


def test_a_finished_store_is_found_finished(tmp_path, space, other_space, unit_rows):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    builder.write("0", unit_rows(2), ["a", "b"])
    builder.finish(["0"])
    again = builder_at(tmp_path, space)
    again.prepare()
    assert again.finished
    EmbeddingStore.open(tmp_path).append(unit_rows(1, 3), ["z"])  # while the builder is still there
    with pytest.raises(StoreError, match="is a finished store; open it and append"):
        again.write("1", unit_rows(1), ["c"])
    assert again.finish(["0", "000001"]).ids == ["a", "b", "z"]
    for other, error, words in (
        (builder_at(tmp_path, other_space), SpaceMismatchError, r"'model-b'.*'model-a'"),
        (
            builder_at(tmp_path, space, modality="text"),
            StoreError,
            r"modality 'image', but the new vectors are 'text'",
        ),
        (
            builder_at(tmp_path, space, dtype="float32"),
            StoreError,
            r"dtype 'float16', but the new vectors are 'float32'",
        ),
    ):
        with pytest.raises(error, match=words):
            other.prepare()


def test_an_unfinished_store_of_another_kind_is_refused(tmp_path, space, other_space):
    builder_at(tmp_path, space).prepare()
    with pytest.raises(SpaceMismatchError, match=r"'model-b'.*'model-a'"):
        builder_at(tmp_path, other_space).prepare()


def test_a_kill_between_the_manifest_and_the_cleanup_is_completed(tmp_path, space, unit_rows, monkeypatch):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    builder.write("0", unit_rows(2), ["a", "b"])
    monkeypatch.setattr("xbt.store.builder.shutil.rmtree", lambda *args, **options: None)
    builder.finish(["0"])
    monkeypatch.undo()
    assert (tmp_path / "in_progress").is_dir()
    assert EmbeddingStore.open(tmp_path).ids == ["a", "b"]
    builder_at(tmp_path, space).prepare()
    assert not (tmp_path / "in_progress").exists()


def test_what_killed_writers_left_is_removed(tmp_path, space, unit_rows):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    leftover = tmp_path / "img_emb" / ".img_emb_3.npy.host-1-abcd.partial"
    leftover.write_bytes(b"half")
    (tmp_path / "img_emb" / "img_emb_7.npy").write_bytes(b"a shard whose record was never written")
    builder.prepare()
    assert not leftover.exists()
    builder.write("0", unit_rows(2), ["a", "b"])
    builder.finish(["0"])
    assert [path.name for path in (tmp_path / "img_emb").iterdir()] == ["img_emb_0.npy"]


def test_files_of_the_user_s_own_stay(tmp_path, space, unit_rows):
    own = [tmp_path / "metadata/my_labels.parquet", tmp_path / "img_emb/pca_mean.npy"]
    for path in own:
        path.parent.mkdir()
        path.write_bytes(b"x")
    builder = builder_at(tmp_path, space)
    builder.prepare()
    builder.write("0", unit_rows(2), ["a", "b"])
    builder.finish(["0"])
    assert all(path.is_file() for path in own)


def test_ids_are_unique_over_all_shards(tmp_path, space, unit_rows):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    builder.write("0", unit_rows(2), ["a", "b"])
    builder.write("1", unit_rows(2), ["c", "d"])
    builder.write("2", unit_rows(2), ["e", "b"])
    with pytest.raises(
        StoreError, match=r"the id 'b' is in the shards 0 and 2 of .*; ids must be unique over the"
    ):
        builder.finish(["0", "1", "2"])
    builder.write("2", unit_rows(2), ["e", "f"])  # nothing else is lost
    assert builder.finish(["0", "1", "2"]).ids == list("abcdef")


def with_repetitions(path, space, unit_rows):
    builder = builder_at(path, space, dtype="float32")
    builder.prepare()
    ids = ["abc", "de", "bfg", "da", "ch"]
    for number, names in enumerate(ids):
        builder.write(
            str(number), unit_rows(len(names), number), list(names), {"caption": list(names.upper())}
        )
    return builder


def note(extra, repeated):
    return {**extra, "repeated": [*extra.get("repeated", []), *map(list, repeated)]}


def test_rows_whose_id_came_before_can_be_left_out(tmp_path, space, unit_rows):
    builder = with_repetitions(tmp_path, space, unit_rows)
    assert builder.leave_out_repeated(note) == 4
    store = builder.finish(map(str, range(5)))
    assert store.ids == list("abcdefgh")
    assert store.metadata()["caption"].to_pylist() == list("ABCDEFGH")
    kept = [unit_rows(3, 0), unit_rows(2, 1), unit_rows(3, 2)[1:], unit_rows(2, 4)[1:]]
    np.testing.assert_array_equal(store.read(), np.concatenate(kept))
    assert dict(store.extra()) == {
        "2": {"repeated": [["b", "0"]]}, "3": {"repeated": [["d", "1"], ["a", "0"]]},
        "4": {"repeated": [["c", "0"]]},
    }  # fmt: skip
    store.verify()


class Killed(BaseException):
    pass


def test_a_kill_while_rows_are_left_out_loses_nothing(tmp_path, space, unit_rows, monkeypatch):
    whole = with_repetitions(tmp_path / "whole", space, unit_rows)
    shutil.copytree(whole.path, tmp_path / "repeated")
    whole.leave_out_repeated(note)
    whole.finish(map(str, range(5)))
    rename, number, ended = Path.replace, 0, False
    while not ended:
        count = 0

        def replace(self, target, number=number):
            nonlocal count
            if count == number:
                raise Killed
            count += 1
            return rename(self, target)

        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "repeated", path)
        builder = builder_at(path, space, dtype="float32")
        builder.prepare()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            try:
                builder.leave_out_repeated(note)
                ended = True
            except Killed:
                pass
        builder.prepare()
        assert len(builder.committed()) == 5
        builder.leave_out_repeated(note)
        builder.finish(map(str, range(5))).verify()
        assert contents_of(path) == contents_of(tmp_path / "whole")
        number += 1
    assert number >= 15  # three shards, of which each takes five


def contents_of(root):
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(root): path.read_bytes() for path in files}


def test_many_passes_over_the_ids_find_the_same_repetition(monkeypatch):
    from xbt.store import metadata

    parts = [[f"{part}-{row}" for row in range(50)] for part in range(4)]
    parts[3][10] = "1-17"
    once = parts[:3]
    for at_once in (2**20, 7):
        monkeypatch.setattr(metadata, "_HASHES_PER_PASS", at_once)
        assert [(part, row) for part, row, _, _ in metadata.repetitions(lambda: parts, 200)] == [(3, 10)]
        assert not list(metadata.repetitions(lambda: once, 150))
    monkeypatch.setattr(metadata, "hashes_of", lambda names: np.zeros(len(names), np.int64))
    assert not list(metadata.repetitions(lambda: once, 150))


def test_damage_before_the_end_is_found_at_the_end(tmp_path, space, unit_rows):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    builder.write("0", unit_rows(2), ["a", "b"])
    (tmp_path / "img_emb" / "img_emb_0.npy").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"img_emb_0.npy of shard '0' has 5 bytes instead of 160"):
        builder.finish(["0"])
    builder.write("0", unit_rows(2), ["a", "b"])
    builder.finish(["0"]).verify()


@pytest.mark.parametrize("name", ["", "a", "../0", "0_", "1.5", 7])
def test_names_are_numbers(tmp_path, space, unit_rows, name):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    with pytest.raises(StoreError, match="consists of digits and underscores"):
        builder.write(name, unit_rows(1), ["a"])


def test_misuse_is_one_sentence(tmp_path, space, unit_rows):
    builder = builder_at(tmp_path / "a", space)
    with pytest.raises(StoreError, match="is not prepared"):
        builder.write("0", unit_rows(1), ["a"])
    builder.prepare()
    with pytest.raises(StoreError, match=r"the note of shard '0' is not JSON"):
        builder.write("0", unit_rows(1), ["a"], extra={"x": {1}})
    builder.write("1", unit_rows(1), ["a"])
    builder.write("01", unit_rows(1), ["b"])
    with pytest.raises(StoreError, match=r"'01' and '1' of .* have the same number"):
        builder.finish(["1", "01"])
    with pytest.raises(StoreError, match=r"1 shards that are not this job's, first '01'"):
        builder.finish(["1"])
    (tmp_path / "b" / "img_emb").mkdir(parents=True)
    (tmp_path / "b" / "img_emb" / "img_emb_0.npy").write_bytes(b"somebody's")
    with pytest.raises(StoreError, match=r"already holds img_emb/img_emb_0.npy, which does not belong"):
        builder_at(tmp_path / "b", space).prepare()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        builder_at(tmp_path / "file", space)


@pytest.mark.parametrize("name", ["header.json", "0.json"])
def test_damaged_records_are_named(tmp_path, space, unit_rows, name):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    builder.write("0", unit_rows(1), ["a"])
    path = tmp_path / "in_progress" / name
    whole = json.loads(path.read_text())
    whole.pop("dim" if name == "header.json" else "files")
    path.write_text(json.dumps(whole))
    with pytest.raises(StoreError, match=rf"{name} is incomplete or damaged"):
        builder.prepare() if name == "header.json" else list(builder.committed().values())


def test_columns_that_could_never_be_read_together_are_refused_at_the_end(tmp_path, space, unit_rows):
    builder = builder_at(tmp_path, space)
    builder.prepare()
    builder.write("0", unit_rows(1), ["a"], {"w": [1]})
    builder.write("1", unit_rows(1), ["b"], {"w": ["x"]})
    with pytest.raises(StoreError, match=r"metadata_1.parquet: column 'w' is string, which does not go toge"):
        builder.finish(["0", "1"])
    builder.write("1", unit_rows(1), ["b"], {"w": [2]})
    assert builder.finish(["0", "1"]).metadata()["w"].to_pylist() == [1, 2]
