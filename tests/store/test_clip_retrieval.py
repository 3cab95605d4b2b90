"""Folders exactly as clip-retrieval writes them: np.save of float16 rows, pandas.DataFrame.to_parquet."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import damaged, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.errors import SpaceMismatchError, StoreError
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore, find_faults


def save_parquet(columns, path):
    """What pandas writes, whether it is installed or not: an index of its own beside the columns."""
    count = len(next(iter(columns.values())))
    try:
        import pandas as pd

        # Rows dropped while the frame was made leave an index that pandas stores as a column.
        pd.DataFrame(columns, index=[2 * row for row in range(count)]).to_parquet(path)
    except ImportError:
        pq.write_table(pa.table({**columns, "__index_level_0__": [2 * row for row in range(count)]}), path)
    assert "__index_level_0__" in pq.read_schema(path).names


def write_folder(
    path, unit_rows, counts, columns=("image_path", "caption"), kinds=("img",), pad=1, dtype="f2"
):
    """Returns the rows of each kind, and the columns, as one array and one list each."""
    rows = {kind: [] for kind in kinds}
    kept = {name: [] for name in columns}
    for number, count in enumerate(counts):
        name = str(number).zfill(pad)
        for offset, kind in enumerate(kinds):
            (path / f"{kind}_emb").mkdir(parents=True, exist_ok=True)
            part = unit_rows(count, seed=10 * number + offset).astype(dtype)
            np.save(path / f"{kind}_emb" / f"{kind}_emb_{name}.npy", part)
            rows[kind].append(part.astype(np.float32))
        if columns:
            (path / "metadata").mkdir(exist_ok=True)
            table = {c: [f"{c} {number}.{row}" for row in range(count)] for c in columns}
            save_parquet(table, path / "metadata" / f"metadata_{name}.parquet")
            for column, values in table.items():
                kept[column] += values
    return {kind: np.concatenate(parts) for kind, parts in rows.items()}, kept


@pytest.mark.parametrize(("pad", "dtype"), [(1, "f2"), (2, "f4"), (3, "<f2")])
def test_a_folder_of_images_is_opened_as_it_is(tmp_path, unit_rows, pad, dtype):
    counts = [4, 1, 0, 3, 2, 2, 2, 2, 2, 2, 5, 1]  # shard 10 comes after shard 9, not after shard 1
    rows, kept = write_folder(tmp_path, unit_rows, counts, pad=pad, dtype=dtype)
    store = EmbeddingStore.open(tmp_path)
    assert (store.modality, len(store), store.dim, store.space) == ("image", 26, 8, None)
    np.testing.assert_array_equal(store.read(), rows["img"])
    assert store.ids == kept["image_path"]
    assert store.read_ids(9, 12) == kept["image_path"][9:12]
    assert store.metadata().to_pydict() == kept
    assert find_faults(tmp_path) == []


def test_without_usable_paths_rows_are_numbered(tmp_path, unit_rows):
    _, kept = write_folder(tmp_path / "a", unit_rows, [2, 2], columns=("caption",), kinds=("text",))
    store = EmbeddingStore.open(tmp_path / "a")
    assert store.modality == "text"
    assert store.ids == ["row-0", "row-1", "row-2", "row-3"]
    assert store.metadata(["caption"]).to_pydict() == kept
    write_folder(tmp_path / "b", unit_rows, [2, 2], columns=())
    assert EmbeddingStore.open(tmp_path / "b").read_ids(1, 3) == ["row-1", "row-2"]
    assert EmbeddingStore.open(tmp_path / "b").columns == []
    write_folder(tmp_path / "c", unit_rows, [2, 2])
    save_parquet({"image_path": ["image_path 0.1", "z"]}, tmp_path / "c" / "metadata" / "metadata_1.parquet")
    assert EmbeddingStore.open(tmp_path / "c").ids[1] == "row-1"  # the path occurs twice
    save_parquet({"image_path": [None, "z"]}, tmp_path / "c" / "metadata" / "metadata_1.parquet")
    assert EmbeddingStore.open(tmp_path / "c").ids[1] == "row-1"  # a path is missing
    save_parquet({"image_path": ["y", "z"]}, tmp_path / "c" / "metadata" / "metadata_1.parquet")
    assert EmbeddingStore.open(tmp_path / "c").ids[1:3] == ["image_path 0.1", "y"]


def test_a_column_id_comes_first_whatever_its_type(tmp_path, unit_rows):
    write_folder(tmp_path, unit_rows, [2], columns=())
    (tmp_path / "metadata").mkdir()
    save_parquet({"id": [17, 4], "image_path": ["a", "b"]}, tmp_path / "metadata" / "metadata_0.parquet")
    assert EmbeddingStore.open(tmp_path).ids == ["17", "4"]


def test_two_modalities_need_a_choice(tmp_path, unit_rows):
    rows, kept = write_folder(tmp_path, unit_rows, [3, 2], kinds=("img", "text"))
    with pytest.raises(StoreError, match=r"image and text vectors; choose with modality="):
        EmbeddingStore.open(tmp_path)
    for modality, kind in (("image", "img"), ("text", "text")):
        store = EmbeddingStore.open(tmp_path, modality)
        np.testing.assert_array_equal(store.read(), rows[kind])
        assert store.ids == kept["image_path"]
    write_folder(tmp_path / "images", unit_rows, [3])
    with pytest.raises(StoreError, match="holds image vectors, not 'text'"):
        EmbeddingStore.open(tmp_path / "images", "text")


def test_the_space_can_be_said(tmp_path, unit_rows, space):
    write_folder(tmp_path, unit_rows, [3])
    assert EmbeddingStore.open(tmp_path, space=space).space is space
    with pytest.raises(SpaceMismatchError, match="have dimension 8, but those of 'wide'"):
        EmbeddingStore.open(tmp_path, space=EmbeddingSpace("wide", 9))


def test_a_folder_is_only_read(tmp_path, unit_rows):
    write_folder(tmp_path, unit_rows, [3])
    with pytest.raises(StoreError, match="has no manifest and is read-only"):
        EmbeddingStore.open(tmp_path).append(unit_rows(1), ["x"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("rows", r"shard '1' of .* has 2 vectors but 1 rows of metadata"),
        ("missing", r"lacks metadata/metadata_1.parquet, which other shards have"),
        ("dimension", r"shard '1' of .* has dimension 5, but the first has 8"),
        ("cut", r"img_emb_1.npy has \d+ bytes, but its 2 rows need \d+; copy it again"),
        ("header", r"img_emb_1.npy is not a whole .npy file"),
        ("empty", r"img_emb_1.npy is not a whole .npy file"),
        ("pickle", r"img_emb_1.npy holds pickled Python objects, which are never loaded"),
        ("integers", r"img_emb_1.npy holds an array of shape \(2, 8\) and type int64"),
        ("columns", r"img_emb_1.npy holds an array of shape \(2, 8\) and type float16, column by column"),
        ("parquet", r"metadata_1.parquet is not a readable parquet file"),
        ("twice", r"shards '01' and '1' of .* have the same number"),
        ("gap", r"shard 1 of .* is missing, but there is img_emb_2.npy"),
        ("first", r"shard 0 of .* is missing"),
        ("orphan", r"metadata_3.parquet belongs to no shard: there is no img_emb/img_emb_3.npy"),
        ("padded", r"metadata_01.parquet belongs to no shard|lacks metadata/metadata_1.parquet"),
    ],
)
def test_damage_names_the_shard(tmp_path, unit_rows, damage, words):
    write_folder(tmp_path, unit_rows, [2, 2, 2])
    npy, parquet = tmp_path / "img_emb" / "img_emb_1.npy", tmp_path / "metadata" / "metadata_1.parquet"
    rows = np.load(npy)
    if damage == "rows":
        save_parquet({"image_path": ["only one"]}, parquet)
    elif damage == "missing":
        parquet.unlink()
    elif damage == "dimension":
        np.save(npy, rows[:, :5].copy())
    elif damage in ("cut", "header", "empty"):
        npy.write_bytes(npy.read_bytes()[: {"cut": -3, "header": 60, "empty": 0}[damage]])
    elif damage == "pickle":
        np.save(npy, np.array([[Exploding()] * 8] * 2, dtype=object), allow_pickle=True)
    elif damage == "integers":
        np.save(npy, np.zeros((2, 8), np.int64))
    elif damage == "columns":
        np.save(npy, np.asfortranarray(rows))
    elif damage == "parquet":
        parquet.write_bytes(parquet.read_bytes()[:-9])
    elif damage in ("gap", "first"):
        number = "1" if damage == "gap" else "0"
        (tmp_path / "img_emb" / f"img_emb_{number}.npy").unlink()
        (tmp_path / "metadata" / f"metadata_{number}.parquet").unlink()
    elif damage == "orphan":
        save_parquet({"image_path": ["nobody's"]}, parquet.with_name("metadata_3.parquet"))
    elif damage == "padded":
        parquet.rename(parquet.with_name("metadata_01.parquet"))
    elif damage == "twice":
        np.save(tmp_path / "img_emb" / "img_emb_01.npy", rows)
    with pytest.raises(StoreError, match=words):
        EmbeddingStore.open(tmp_path)
    assert len(find_faults(tmp_path)) == 1


class Exploding:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_our_stores_are_readable_in_its_layout(tmp_path, space, unit_rows):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(2), ["a", "b"], {"image_path": ["a.jpg", "b.jpg"]})
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["format"] == "xbt-store"
    (tmp_path / "s" / "manifest.json").unlink()
    foreign = EmbeddingStore.open(tmp_path / "s")
    assert foreign.ids == ["a", "b"]
    np.testing.assert_array_equal(foreign.read(), store.read())


def write_tables(path, unit_rows, tables):
    for number, table in enumerate(tables):
        for folder in ("img_emb", "metadata"):
            (path / folder).mkdir(exist_ok=True)
        rows = unit_rows(len(next(iter(table.values()))), seed=number)
        np.save(path / f"img_emb/img_emb_{number}.npy", rows)
        pq.write_table(pa.table(table), path / f"metadata/metadata_{number}.parquet")


@pytest.mark.parametrize("others", [[3.0, 4.5], ["x", "y"], [3, 2**53 + 1]])
def test_ids_are_strings_by_the_type_of_their_own_shard(tmp_path, unit_rows, others):
    write_tables(tmp_path, unit_rows, [{"id": [1, 2]}, {"id": others}, {"id": [0.5]}])
    store = EmbeddingStore.open(tmp_path)
    assert store.ids == ["1", "2", *map(str, others), "0.5"]
    assert store.read_ids(0, 2) == ["1", "2"]
    assert store.read_ids(1, 4) == store.ids[1:4]


@pytest.mark.parametrize(("others", "kind"), [(["x"], "string"), ([0.5], "double")])
def test_columns_that_do_not_go_together_are_named(tmp_path, unit_rows, others, kind):
    tables = [{"id": ["a", "b"], "w": [1, 2**53 + 1], "caption": ["one", "two"]}, {"id": ["c"], "w": others}]
    write_tables(tmp_path, unit_rows, tables)
    store = EmbeddingStore.open(tmp_path)
    with pytest.raises(StoreError, match=rf"column 'w' of .*metadata_1.parquet is {kind} and cannot be joi"):
        store.metadata()
    assert store.metadata(["caption"])["caption"].to_pylist() == ["one", "two", None]
    assert store.metadata(["w"], 2)["w"].to_pylist() == others
    with pytest.raises(StoreError, match=rf"1 faults: .*metadata_1.parquet: column 'w' is {kind}, which do"):
        store.verify()


def test_nan_is_found(tmp_path, unit_rows):
    write_folder(tmp_path, unit_rows, [4, 5, 3])
    rows = np.load(tmp_path / "img_emb/img_emb_1.npy")
    rows[3, 2], rows[4, 0] = np.nan, np.inf
    np.save(tmp_path / "img_emb/img_emb_1.npy", rows)
    words = r"1 faults: .*img_emb_1.npy of shard '1' has NaN or infinity, first in its row 3: copy it again"
    with pytest.raises(StoreError, match=words):
        EmbeddingStore.open(tmp_path).verify()


@pytest.mark.parametrize(
    ("value", "normalisation", "words"),
    [
        (np.nan, "none", "has NaN or infinity, first in its row 1"),
        (np.inf, "unit", "has NaN or infinity, first in its row 1"),
        (3.0, "unit", r"not of length 1, first in its row 1 \(lengths differ from 1 by up to 2"),
        (1e4, "unit", "not of length 1, first in its row 1"),
        (0.0, "unit", r"not of length 1, first in its row 1 \(lengths differ from 1 by up to 1\)"),
        (1.02, "unit", "not of length 1, first in its row 1"),
        (3.0, "none", None),
        (1.001, "unit", None),
    ],
)
def test_rows_are_looked_at_wherever_they_are_read(tmp_path, unit_rows, value, normalisation, words):
    rows, _ = write_folder(tmp_path, unit_rows, [4, 3])
    path = tmp_path / "img_emb" / "img_emb_1.npy"
    changed = np.load(path)
    changed[1] = 0
    changed[1, 3] = value
    np.save(path, changed)
    space = EmbeddingSpace("m", 8, normalisation=normalisation)
    store = EmbeddingStore.open(tmp_path, space=space)
    readers = (store.read, lambda: store.rows([6, 5]), lambda: list(store.batches(2)), store.verify)
    for use in readers:
        if words is None:
            use()
        else:
            with pytest.raises(StoreError, match=rf"img_emb_1.npy of shard '1' .*{words}"):
                use()
    np.testing.assert_array_equal(store.read(0, 4), rows["img"][:4])  # sound rows are still read


@pytest.mark.parametrize("dim", [8, 512, 30_000])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_normalised_in_half_precision_pass_as_unit(tmp_path, dim, kind):
    drawn = torch.randn(50, dim, generator=torch.Generator().manual_seed(1)).to(kind)
    rows = drawn / drawn.norm(dim=1, keepdim=True)
    (tmp_path / "text_emb").mkdir()
    np.save(tmp_path / "text_emb" / "text_emb_0.npy", rows.to(torch.float16).numpy())
    assert len(EmbeddingStore.open(tmp_path, space=EmbeddingSpace("m", dim)).read()) == 50


FILES = (
    "img_emb/img_emb_0.npy",
    "img_emb/img_emb_1.npy",
    "metadata/metadata_0.parquet",
    "metadata/metadata_1.parquet",
)


@fuzzed
@given(
    data=st.data(),
    name=st.sampled_from(FILES),
    other=st.sampled_from([*FILES, "metadata/metadata_7.parquet"]),
)
def test_fuzz_folder(data, name, other, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    rows = np.eye(3, 8, dtype=np.float16)
    write_folder(path, lambda count, seed: rows[:count].copy(), [3, 2])
    content = (path / name).read_bytes()
    (path / other).write_bytes(data.draw(damaged(content)))

    def use():
        store = EmbeddingStore.open(path)
        return store.read(), store.ids, store.metadata()

    loads_or_refuses(use)
    loads_or_refuses(lambda: find_faults(path))
