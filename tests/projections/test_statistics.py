from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import TERMS, PairStatistics

ATTRIBUTES = ("cross", "new_sum", "old_sum", "new_gram", "old_gram")


def rows(n, dim, seed, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(dtype)


def expected(new, old):
    new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
    return {
        "cross": new.T @ old,
        "new_sum": new.sum(0),
        "old_sum": old.sum(0),
        "new_gram": new.T @ new,
        "old_gram": old.T @ old,
    }


def assert_equal(stats, wanted, rtol=1e-12):
    for name in ATTRIBUTES:
        found = stats.term(name)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(
            found.numpy(), wanted[name], rtol=rtol, atol=rtol * np.abs(wanted[name]).max()
        )


@pytest.mark.parametrize("dims", [(1, 1), (5, 3), (3, 5), (300, 140)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equals_numpy(dims, dtype):
    new, old = rows(50, dims[0], 0, dtype), rows(50, dims[1], 1, dtype)
    stats = PairStatistics.of(new, old, TERMS)
    assert (stats.count, stats.dims) == (50, dims)
    assert_equal(stats, expected(new, old))


@pytest.mark.parametrize("distinct", [1, 6, 20_000])
@pytest.mark.parametrize("offset", [0, 1])
def test_float32_blocks_stay_within_the_stated_error(monkeypatch, distinct, offset):
    monkeypatch.setattr("xbt.projections.sources.EXACT_ROWS", 0)
    drawn = torch.arange(20_000) % distinct
    new = torch.nn.functional.normalize(torch.randn(20_000, 48) + offset, dim=1).half()[drawn]
    old = torch.nn.functional.normalize(torch.randn(20_000, 32) + offset, dim=1).half()[drawn]
    wanted = expected(new, old)
    found = PairStatistics.of(new, old, TERMS)
    exact = PairStatistics.of(new.double(), old.double(), TERMS)
    assert found.rounding == 1e-6
    for name in ("cross", "new_gram", "old_gram"):
        error = np.linalg.norm(found.term(name).numpy() - wanted[name], 2)
        assert 0 < error < found.rounding * np.linalg.norm(wanted[name])
    assert_equal(exact, wanted)


def test_rounding_is_that_of_the_rows_in_single_precision(monkeypatch):
    new, old = rows(300, 6, 0, np.float32), rows(300, 4, 1, np.float32)
    exact = PairStatistics.of(new, old)
    assert exact.fp32_rows == 0
    assert exact.rounding < 1e-13
    monkeypatch.setattr("xbt.projections.sources.BLOCK_ROWS", 100)
    monkeypatch.setattr("xbt.projections.sources.EXACT_ROWS", 200)
    partly = PairStatistics.of(new, old, ("cross", "sums"))
    assert partly.rounding == pytest.approx(1e-6 / 3)
    assert (partly + exact).rounding == pytest.approx(1e-6 / 6)
    assert partly.centred().rounding == partly.rounding
    assert partly.mixed(exact, 0.5).rounding == pytest.approx(1e-6 / 6)
    assert PairStatistics.from_tensors(partly.to_tensors(), (6, 4)).rounding == partly.rounding
    assert PairStatistics.of(new.astype(np.float64), old).fp32_rows == 0


def test_only_what_was_asked_for_is_there():
    stats = PairStatistics.of(rows(9, 4, 0), rows(9, 3, 1), ("new_gram",))
    assert stats.cross is None
    assert stats.old_gram is None
    with pytest.raises(ConfigError, match="without cross"):
        stats.term("cross")
    with pytest.raises(ConfigError, match="without new_sum"):
        stats.centred()
    with pytest.raises(ConfigError, match=r"no term 'gram'.*new_gram"):
        PairStatistics.of(rows(9, 4, 0), rows(9, 3, 1), ("gram",))


def test_parts_make_the_whole():
    new, old = rows(100, 6, 0), rows(100, 4, 1)
    parts = [PairStatistics.of(new[a:b], old[a:b], TERMS) for a, b in ((0, 1), (1, 60), (60, 100))]
    merged = parts[0] + parts[1] + parts[2]
    assert merged.count == 100
    assert_equal(merged, expected(new, old))
    chunks = [
        (torch.from_numpy(new[a:b]), torch.from_numpy(old[a:b])) for a, b in ((0, 33), (33, 33), (33, 100))
    ]
    assert_equal(PairStatistics.from_chunks(chunks, TERMS), expected(new, old))
    np.testing.assert_array_equal(chunks[0][0].numpy(), new[:33])
    with pytest.raises(SpaceMismatchError, match=r"6 → 4 .* 5 → 4"):
        _ = merged + PairStatistics.of(rows(3, 5, 0), rows(3, 4, 0), TERMS)


def test_means_and_centred_covariances():
    new, old = rows(80, 5, 0) + 2, rows(80, 3, 1) - 1
    stats = PairStatistics.of(new, old, TERMS)
    np.testing.assert_allclose(stats.means[0].numpy(), new.mean(0))
    np.testing.assert_allclose(stats.means[1].numpy(), old.mean(0))
    centred = stats.centred()
    np.testing.assert_allclose(centred.term("new_gram").numpy() / 80, np.cov(new.T, bias=True), atol=1e-12)
    both = np.cov(new.T, old.T, bias=True)
    np.testing.assert_allclose(centred.term("cross").numpy() / 80, both[:5, 5:], atol=1e-12)
    np.testing.assert_allclose(centred.term("old_gram").numpy() / 80, both[5:, 5:], atol=1e-12)
    assert not centred.term("new_sum").any()
    assert centred.count == 80


def test_a_mixture_is_the_weighted_mean_of_both():
    new, old, new_b, old_b = rows(80, 5, 0), rows(80, 3, 1), rows(7, 5, 2), rows(7, 3, 3)
    a, b = (PairStatistics.of(*sides, TERMS) for sides in ((new, old), (new_b, old_b)))
    mixed = a.mixed(b, 0.25)
    wanted, other = expected(new, old), expected(new_b, old_b)
    assert mixed.count == 80
    assert_equal(
        mixed, {name: 80 * (0.75 * wanted[name] / 80 + 0.25 * other[name] / 7) for name in ATTRIBUTES}
    )
    assert_equal(a.mixed(b, 0.0), wanted)
    assert_equal(a, wanted)  # neither is changed
    for weight in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="pairs_weight"):
            a.mixed(b, weight)


def test_through_tensors():
    stats = PairStatistics.of(rows(8, 5, 0), rows(8, 3, 1), ("cross", "sums"))
    tensors = stats.to_tensors()
    assert set(tensors) == {"count", "fp32_rows", "cross", "new_sum", "old_sum"}
    again = PairStatistics.from_tensors(tensors, stats.dims)
    assert (again.count, again.dims) == (8, (5, 3))
    assert torch.equal(again.term("cross"), stats.term("cross"))


def _merge(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    new, old = rows(100, 6, 0), rows(100, 4, 1)
    part = slice(0, 30) if rank == 0 else slice(30, 100)
    mine = PairStatistics.of(new[part], old[part], TERMS)
    tensors = mine.to_tensors()
    for tensor in tensors.values():
        dist.all_reduce(tensor)
    merged = PairStatistics.from_tensors(tensors, mine.dims)
    assert merged.count == 100
    assert_equal(merged, expected(new, old))
    dist.destroy_process_group()


def test_two_processes_merge_to_one_pass(tmp_path):
    mp.start_processes(_merge, (str(tmp_path),), nprocs=2, start_method="fork")


@pytest.mark.parametrize("side", ["new", "old"])
@pytest.mark.parametrize("terms", [("cross",), ("sums",), TERMS])
def test_chunks_that_are_not_finite_name_the_row(monkeypatch, side, terms):
    monkeypatch.setattr("xbt.projections.sources.BLOCK_ROWS", 4)
    vectors = {"new": torch.randn(30, 5), "old": torch.randn(30, 3)}
    vectors[side][21, 2] = float("nan")
    vectors[side][25, 2] = float("inf")
    chunks = [
        (vectors["new"][start : start + 10], vectors["old"][start : start + 10]) for start in (0, 10, 20)
    ]
    with pytest.raises(DataError, match=f"{side} vectors .*first in row 21"):
        PairStatistics.from_chunks(chunks, terms)


def test_values_too_large_for_float32_products(monkeypatch):
    monkeypatch.setattr("xbt.projections.sources.EXACT_ROWS", 0)
    new, old = torch.full((3, 2), 1e30), torch.full((3, 2), 1e30)
    assert float(PairStatistics.of(new, old).term("cross")[0, 0]) == pytest.approx(3e60, rel=1e-6)
    with pytest.raises(DataError, match="too large for float64"):
        PairStatistics.of(new.double() * 1e200, old.double() * 1e200)


def test_chunks_that_do_not_pair():
    with pytest.raises(DataError, match="0 rows"):
        PairStatistics.from_chunks([])
    with pytest.raises(DataError, match="a chunk has 3 new and 2 old rows"):
        PairStatistics.from_chunks([(torch.ones(3, 2), torch.ones(2, 2))])
    with pytest.raises(SpaceMismatchError, match="2 → 2"):
        PairStatistics.from_chunks(
            [(torch.ones(3, 2), torch.ones(3, 2)), (torch.ones(3, 4), torch.ones(3, 2))]
        )


def test_images_of_pairs():
    texts, images = rows(6, 4, 0), rows(3, 4, 1)
    pairs = PairVectors(texts, texts[:, :3], images[:, :3], [0, 0, 1, 1, 2, 2], images)
    stats = PairStatistics.of_images(pairs, TERMS)
    assert_equal(stats, expected(pairs.new_images, pairs.old_images))
    with pytest.raises(ConfigError, match="no new image vectors"):
        PairStatistics.of_images(PairVectors(texts, texts, images, [0, 0, 1, 1, 2, 2]))
