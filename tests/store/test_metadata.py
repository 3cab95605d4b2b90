"""Parquet files of a store: broken text, odd types, and damage."""

from __future__ import annotations

import datetime
import decimal
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import damaged, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.errors import StoreError
from xbt.store import EmbeddingStore, find_faults

ROWS = np.eye(3, 8, dtype=np.float16)


def parquet(table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def folder(path, data, rows=ROWS):
    for name in ("img_emb", "metadata"):
        (path / name).mkdir(parents=True, exist_ok=True)
    np.save(path / "img_emb" / "img_emb_0.npy", rows)
    (path / "metadata" / "metadata_0.parquet").write_bytes(data)
    return path


def use(path):
    store = EmbeddingStore.open(path)
    return store.ids, store.metadata(), store.columns


@pytest.mark.parametrize("column", ["id", "caption"])
def test_broken_utf8_names_file_row_and_column(tmp_path, column):
    values = ["Straße 1", "Straße 2", "Gasse"]
    data = parquet(pa.table({column: values}), compression="none", use_dictionary=False)
    broken = "Straße 2".encode().replace(b"\xc3\x9f", b"\xc3\xdf")
    folder(tmp_path, data.replace("Straße 2".encode(), broken))
    with pytest.raises(StoreError, match=rf"metadata_0.parquet: the value of row 1 in column '{column}'"):
        use(tmp_path)
    assert len(find_faults(tmp_path)) == 1


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(list("abc")), pa.array(list("xyz"))], names=["caption", "caption"])
    folder(tmp_path, parquet(table))
    with pytest.raises(StoreError, match="two columns of the name 'caption'"):
        EmbeddingStore.open(tmp_path)
    assert len(find_faults(tmp_path)) == 1


def test_ids_that_python_cannot_hold_are_named(tmp_path):
    far = pa.array([0, 1, 2**60], pa.timestamp("us"))
    folder(tmp_path, parquet(pa.table({"id": far})))
    with pytest.raises(StoreError, match=r"column 'id' of .*metadata_0.parquet: the value of row 2"):
        use(tmp_path)


ODD = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3).flatmap(
        lambda values: st.sampled_from(
            [
                *(pa.int64(), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "Mars/Olympus")),
                *(pa.duration("s"), pa.time64("ns"), pa.date64()),
            ]
        ).map(lambda kind: pa.array(values, pa.int64()).view(kind))
    ),
    st.sampled_from(
        [
            pa.array([b"\xff", b"", None]),
            pa.array([None] * 3),
            pa.array([[1], [], None]),
            pa.array([{"a": 1}, {"a": None}, None]),
            pa.array([decimal.Decimal("1.5")] * 3),
            pa.array([datetime.date(1, 1, 1)] * 3),
            pa.array(list("aab")).dictionary_encode(),
            pa.array([1.5, float("nan"), float("inf")]),
            pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
            pa.array(["x" * 100_000, "", "\u202e"]),
            pa.array([True, False, None]),
        ]
    ),
)


@fuzzed
@given(
    columns=st.dictionaries(
        st.sampled_from(["id", "image_path", "", "é", "__index_level_0__"]), ODD, max_size=3
    )
)
def test_fuzz_odd_types(columns, tmp_path_factory):
    try:
        data = parquet(pa.table(columns)) if columns else parquet(pa.table({"id": list("abc")}))
    except pa.ArrowException:
        return  # of no use to parquet
    path = folder(tmp_path_factory.mktemp("odd"), data)
    loads_or_refuses(lambda: use(path))
    loads_or_refuses(lambda: find_faults(path))


WHOLE = parquet(pa.table({"id": ["one", "twö", "three"], "n": [1, 2, 3]}), compression="none")


@fuzzed
@given(data=damaged(WHOLE))
def test_fuzz_parquet(data, tmp_path_factory):
    path = folder(tmp_path_factory.mktemp("parquet"), data)
    loads_or_refuses(lambda: use(path), len(data))
    loads_or_refuses(lambda: find_faults(path), len(data))
