"""Headers of ``.npy`` shards: whatever is in them, a shard is read as it was written or refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from fuzzing import damaged, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.errors import StoreError
from xbt.store import EmbeddingStore
from xbt.store.rows import inspect_npy, read_npy_header

ROWS = np.random.default_rng(3).standard_normal((5, 6)).astype(np.float16)
OFFSET = len(np.lib.format.magic(1, 0)) + 2 + 118
pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy`", "ignore::DeprecationWarning")


def npy(rows=ROWS):
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


@pytest.fixture
def shard(tmp_path):
    (tmp_path / "text_emb").mkdir()
    return tmp_path / "text_emb" / "text_emb_0.npy"


def read(shard):
    return EmbeddingStore.open(shard.parent.parent).read()


def test_flipped_bits_in_every_byte_of_a_header_is_refused_or_changes_nothing(shard):
    whole, accepted = npy(), 0
    for place in range(OFFSET):
        for bit in (0, 3, 5, 7):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            shard.write_bytes(flipped)
            rows = loads_or_refuses(lambda: read(shard))
            if rows is not None:
                accepted += 1
                np.testing.assert_array_equal(rows, ROWS.astype(np.float32))
    assert accepted < 10


@pytest.mark.parametrize(
    ("descr", "shape", "words"),
    [
        ("<f2", (10**12, 6), r"10\d* rows need"),
        ("<f2", (10**30, 6), "rows need"),
        ("<f2", (-5, 6), "not a whole .npy file"),
        ("<f2", (0, 0), "rows without values"),
        (">f2", (5, 6), "big-endian"),
        ("|O", (5, 6), "pickled Python objects"),
        ("<i2", (5, 6), "float16 or float32"),
        ([("a", "<f2")], (5, 6), "float16 or float32"),
    ],
)
def test_impossible_headers_are_refused_before_anything_is_read(shard, descr, shape, words):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    shard.write_bytes(file.getvalue() + (b"" if 0 in shape else npy()[OFFSET:]))
    with pytest.raises(StoreError, match=words):
        read(shard)


def test_a_header_that_claims_gigabytes_takes_no_memory():
    for head in (
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY\x03\x00\x00\x00\x00\x80{",
        b"\x93NUMPY\x01\x01",
    ):
        with pytest.raises(ValueError, match=r"EOF|header|version|array"):
            read_npy_header(head)


def test_shards_of_another_type_are_refused(shard):
    shard.write_bytes(npy())
    shard.with_name("text_emb_1.npy").write_bytes(npy(ROWS.astype(np.float32)))
    with pytest.raises(StoreError, match=r"shard '1' .* type <f4, but the first has <f2"):
        read(shard)


def test_a_manifest_knows_the_type(tmp_path, space, unit_rows):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space, dtype="float32")
    store.append(unit_rows(4), list("abcd"))
    path = tmp_path / "s" / "img_emb" / "img_emb_000000.npy"
    rows = np.zeros((4, 16), np.float16)  # as many bytes
    rows[:, 0] = 1
    path.write_bytes(npy(rows[:, :8].copy()) + bytes(64))
    with pytest.raises(StoreError, match=r"img_emb_000000.npy"):
        EmbeddingStore.open(tmp_path / "s").read()


@fuzzed
@given(data=damaged(npy()))
def test_fuzz_npy(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("npy") / "img_emb"
    folder.mkdir()
    path = folder / "img_emb_0.npy"
    path.write_bytes(data)
    loads_or_refuses(lambda: (inspect_npy(path), read(path)), len(data))


LITERALS = st.recursive(
    st.sampled_from(
        ["1", "0", "-1", "10**9", "True", "None", "'<f2'", "'f4'", "'O'", "()", "{}", "1e9", "(3, 4)"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"({', '.join(parts)},)") | inner.map("[{}]".format)
    ),
    max_leaves=6,
)


@fuzzed
@given(
    values=st.tuples(LITERALS, LITERALS, LITERALS),
    version=st.sampled_from([1, 2, 3]),
    tail=st.binary(max_size=64),
)
def test_fuzz_npy_header(values, version, tail):
    text = "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format(*values).encode()
    head = b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text
    try:
        shape, _, _, offset = read_npy_header(head + tail)
    except ValueError:
        return
    assert all(isinstance(size, int) and size >= 0 for size in shape)
    assert offset == len(head)
