from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError, DataError, SpaceMismatchError, XbtError
from xbt.projections.sources import paired_chunks, random_access
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

N = 23


def rows(dim, seed, n=N):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def store(path, vectors, ids=None, dtype="float32"):
    made = EmbeddingStore.create(
        path,
        modality="text",
        space=EmbeddingSpace(path.name, vectors.shape[1], normalisation="none"),
        dtype=dtype,
    )
    names = ids or [f"item {number}" for number in range(len(vectors))]
    for start in range(0, len(vectors), 9):
        made.append(vectors[start : start + 9], names[start : start + 9])
    return made


def stream(vectors, sizes):
    start = 0
    for size in sizes:
        yield vectors[start : start + size]
        start += size


def whole(chunks):
    parts = list(chunks)
    new, old = (torch.cat(side) for side in zip(*parts, strict=True))
    return new, old, [len(part[0]) for part in parts]


NEW, OLD = rows(4, 0), rows(3, 1)


@pytest.fixture
def sides(tmp_path):
    return {
        "tensor": (torch.from_numpy(NEW), torch.from_numpy(OLD)),
        "array": (NEW, OLD),
        "store": (store(tmp_path / "new", NEW), store(tmp_path / "old", OLD)),
        "stream": (stream(NEW, [0, 1, 15, 7]), stream(torch.from_numpy(OLD), [9, 0, 0, 14])),
    }


@pytest.mark.parametrize("new_kind", ["tensor", "array", "store", "stream"])
@pytest.mark.parametrize("old_kind", ["tensor", "array", "store", "stream"])
@pytest.mark.parametrize("size", [1, 7, N, 100])
def test_every_kind_gives_the_same_rows(sides, new_kind, old_kind, size):
    new, old, counts = whole(paired_chunks(sides[new_kind][0], sides[old_kind][1], size))
    assert new.dtype == old.dtype == torch.float32
    np.testing.assert_array_equal(new.numpy(), NEW)
    np.testing.assert_array_equal(old.numpy(), OLD)
    assert counts == [size] * (N // size) + ([N % size] if N % size else [])


def test_a_stream_may_fill_the_same_memory_again():
    def reusing():
        buffer = np.empty((1, 4), np.float32)
        for row in NEW:
            buffer[:] = row
            yield buffer

    new, _, _ = whole(paired_chunks(reusing(), OLD, 7))
    np.testing.assert_array_equal(new.numpy(), NEW)


def test_precision_is_kept_or_raised():
    half, double = torch.from_numpy(NEW).half(), OLD.astype(np.float64)
    new, old, _ = whole(paired_chunks(half, double))
    assert (new.dtype, old.dtype) == (torch.float32, torch.float64)
    assert torch.equal(new, half.float())
    big_endian = OLD.astype(">f4")[::-1]
    old = whole(paired_chunks(torch.from_numpy(NEW).bfloat16(), big_endian))[1]
    np.testing.assert_array_equal(old.numpy(), OLD[::-1])


@pytest.mark.parametrize("kind", ["tensor", "array", "store", "stream"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_by_its_row(tmp_path, kind, value):
    broken = OLD.copy()
    broken[17, 1] = value
    if kind == "store":  # a store refuses to be written like that, so its file is damaged later
        made = store(tmp_path / "old", OLD)
        path = sorted((tmp_path / "old").rglob("*.npy"))[1]
        damaged = np.load(path)
        damaged[17 - 9, 1] = value
        np.save(path, damaged)
        side = EmbeddingStore.open(made.path)
    else:
        side = {"tensor": torch.from_numpy(broken), "array": broken, "stream": stream(broken, [5, 18])}[kind]
    words = r"text_emb_000001\.npy .* NaN .* row 8" if kind == "store" else r"old vectors.* first in row 17"
    with pytest.raises(XbtError, match=words):
        list(paired_chunks(NEW, side, 4))


def test_huge_but_finite_values_are_not_refused():
    huge = np.full((N, 3), 3e38, np.float32)
    assert torch.equal(whole(paired_chunks(NEW, huge))[1], torch.from_numpy(huge))


def test_counts_must_agree(tmp_path):
    with pytest.raises(DataError, match="there are 23 new and 22 old rows"):
        list(paired_chunks(NEW, OLD[:-1]))
    with pytest.raises(DataError, match="there are 23 new and 22 old rows"):
        list(paired_chunks(store(tmp_path / "new", NEW), OLD[:-1]))
    for size in (1, 4, 11, 100):
        with pytest.raises(DataError, match="old vectors end after 22 rows, but the new vectors go on"):
            list(paired_chunks(NEW, stream(OLD, [11, 11]), size))
        with pytest.raises(DataError, match="new vectors end after 22 rows, but the old vectors go on"):
            list(paired_chunks(stream(NEW, [22]), stream(OLD, [N]), size))


@pytest.mark.parametrize(
    ("new", "old"), [(NEW[:0], OLD[:0]), ([], []), (iter([NEW[:0]]), torch.zeros(0, 3)), ([], OLD[:0])]
)
def test_nothing_is_refused(new, old):
    with pytest.raises(DataError, match="new vectors is empty"):
        list(paired_chunks(new, old))


def test_what_are_no_vectors():
    for side, words in (
        (5, "of type int"),
        (None, "of type NoneType"),
        (NEW.astype(int), "floating point, got int64"),
        (NEW[0], r"shape \(n, dim\), got \(4,\)"),
        (np.ones(()), r"shape \(n, dim\), got \(\)"),
        (NEW[:, :0], r"got \(23, 0\)"),
        ([NEW, [1.0]], "chunk 1 of the new vectors is a list"),
        ("path/to/store", "chunk 0 of the new vectors is a str"),
        ([NEW[0]], r"chunk 0 of the new vectors must have the shape \(n, dim\)"),
    ):
        with pytest.raises(DataError, match=words):
            list(paired_chunks(side, OLD))
    with pytest.raises(SpaceMismatchError, match=r"chunk 1 .*dimension 5, but those before it have 4"):
        list(paired_chunks([NEW, rows(5, 2)], OLD))
    with pytest.raises(ConfigError, match="rows=0"):
        list(paired_chunks(NEW, OLD, 0))


def test_ids_of_stores_must_agree(tmp_path):
    names = [f"item {number}" for number in range(N)]
    swapped = [*names[:12], names[13], names[12], *names[14:]]
    new, old = store(tmp_path / "new", NEW), store(tmp_path / "old", OLD, swapped)
    for check in (lambda: list(paired_chunks(new, old, 5)), lambda: random_access(new, old)):
        with pytest.raises(DataError, match=r"row 12 has the id 'item 12' in .*new but 'item 13' in .*old"):
            check()


def test_the_caller_may_stop_reading(sides):
    new, old = next(iter(paired_chunks(*sides["store"], 5)))
    assert len(new) == len(old) == 5


@pytest.mark.parametrize("kind", ["tensor", "array", "store"])
def test_random_access(sides, kind):
    paired = random_access(*sides[kind])
    assert (len(paired), paired.dims) == (N, (4, 3))
    positions = np.array([22, 0, 7, 7], np.int64)
    new, old = paired.take(positions)
    assert new.dtype == old.dtype == torch.float32
    np.testing.assert_array_equal(new.numpy(), NEW[positions])
    np.testing.assert_array_equal(old.numpy(), OLD[positions])


def test_random_access_gives_float32():
    new, old = random_access(NEW.astype(np.float64), torch.from_numpy(OLD).half()).take(np.arange(3))
    assert new.dtype == old.dtype == torch.float32


def test_random_access_refusals():
    with pytest.raises(ConfigError, match=r"old vectors are a stream \(list\).*only once"):
        random_access(NEW, [OLD])
    with pytest.raises(ConfigError, match="new vectors are a stream"):
        random_access(stream(NEW, [N]), OLD)
    with pytest.raises(DataError, match="23 new and 22 old"):
        random_access(NEW, OLD[:-1])
    with pytest.raises(DataError, match="new vectors is empty"):
        random_access(NEW[:0], OLD[:0])
    broken = NEW.copy()
    broken[20] = np.nan
    with pytest.raises(DataError, match=r"new vectors.*first in row 20"):
        random_access(broken, OLD)
