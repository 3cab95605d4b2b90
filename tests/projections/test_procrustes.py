from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections import (
    PairStatistics,
    PairVectors,
    fit_procrustes,
    fit_projection,
    procrustes_rotation,
    procrustes_rotation_of_chunks,
)
from xbt.space import EmbeddingSpace


def unit_rows(n, dim, seed=0):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def orthonormal_columns(rows, columns, seed=1):
    return torch.linalg.qr(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )[0]


def test_equals_scipy_on_square_problems():
    new, old = unit_rows(200, 24), unit_rows(200, 24, 1)
    expected, _ = orthogonal_procrustes(new.double().numpy(), old.double().numpy())
    np.testing.assert_allclose(procrustes_rotation(new, old).numpy(), expected.T, atol=1e-6)


@pytest.mark.parametrize("borders", [(0, 200), (0, 1, 77, 200), (0, 100, 100, 200)])
def test_pieces_of_any_size_give_what_the_whole_gives(borders):
    new, old = unit_rows(200, 24), unit_rows(200, 24, 1)
    expected, _ = orthogonal_procrustes(new.double().numpy(), old.double().numpy())
    chunks = ((new[start:stop], old[start:stop]) for start, stop in pairwise(borders))
    np.testing.assert_allclose(procrustes_rotation_of_chunks(chunks).numpy(), expected.T, atol=1e-6)


def test_no_pieces_are_refused():
    with pytest.raises(DataError, match="there are 0 rows"):
        procrustes_rotation_of_chunks([])


@pytest.mark.parametrize(("new_dim", "old_dim"), [(32, 32), (48, 32), (1024, 512), (768, 512)])
def test_recovers_a_hidden_rotation(new_dim, old_dim):
    hidden = orthonormal_columns(new_dim, old_dim)
    # New vectors in the span of the hidden map's columns, so that the old vectors tell all about them.
    old = unit_rows(1500, old_dim).double()
    new = old @ hidden.T
    assert (procrustes_rotation(new, old) - hidden.T).abs().max() < 1e-6


@pytest.mark.parametrize(("new_dim", "old_dim"), [(32, 48), (512, 768)])
def test_recovers_an_embedding_into_more_dimensions(new_dim, old_dim):
    hidden = orthonormal_columns(old_dim, new_dim)
    new = unit_rows(1500, new_dim).double()
    assert (procrustes_rotation(new, new @ hidden.T) - hidden).abs().max() < 1e-6


@pytest.mark.parametrize(("new_dim", "old_dim"), [(40, 24), (24, 40)])
def test_is_orthonormal_on_noise(new_dim, old_dim):
    weight = procrustes_rotation(unit_rows(300, new_dim), unit_rows(300, old_dim, 1)).double()
    gram = weight @ weight.T if old_dim < new_dim else weight.T @ weight
    assert (gram - torch.eye(min(new_dim, old_dim))).abs().max() < 1e-6


def test_beats_every_perturbed_rotation():
    new, old = unit_rows(100, 8).double(), unit_rows(100, 8, 1).double()
    best = procrustes_rotation(new, old).double()
    score = ((new @ best.T) * old).sum()
    for seed in range(20):
        skew = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = best @ torch.linalg.matrix_exp(0.1 * (skew - skew.T))
        assert ((new @ other.T) * old).sum() < score


def as_pairs(n, new_dim, old_dim, seed=5):
    """Images whose vectors are off the texts' mean, as those of CLIP are."""
    texts = unit_rows(n, new_dim, seed), unit_rows(n, old_dim, seed + 1)
    images = unit_rows(n, new_dim, seed + 2) + 0.1, unit_rows(n, old_dim, seed + 3) - 0.1
    return PairVectors(texts[0], texts[1], images[1], range(n), images[0])


def scipy_rotation(new, old, weights=None):
    weights = np.ones(len(new)) if weights is None else weights
    new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
    return orthogonal_procrustes(new * weights[:, None], old)[0].T


def test_joint_centring_equals_scipy_on_centred_vectors():
    new, old = unit_rows(200, 12).double() + 0.3, unit_rows(200, 12, 1).double() - 0.2
    projection = fit_procrustes(new, old, centring="joint")
    expected = scipy_rotation(new - new.mean(0), old - old.mean(0))
    np.testing.assert_allclose(projection.weight.detach().numpy(), expected, atol=1e-6)
    bias = old.mean(0).numpy() - expected @ new.mean(0).numpy()
    np.testing.assert_allclose(projection.bias.detach().numpy(), bias, atol=1e-6)
    assert projection.image_bias is None


@pytest.mark.parametrize("centring", ["none", "joint"])
def test_pairs_are_weighted_rows(centring):
    new, old, pairs = unit_rows(60, 8).double(), unit_rows(60, 8, 1).double(), as_pairs(20, 8, 8)
    all_new = torch.cat([new, pairs.new_images])
    all_old = torch.cat([old, pairs.old_images])
    weights = np.concatenate([np.full(60, 0.6 / 60), np.full(20, 0.4 / 20)])
    if centring == "joint":
        all_new = all_new - torch.from_numpy(weights) @ all_new
        all_old = all_old - torch.from_numpy(weights) @ all_old
    found = fit_procrustes(new, old, pairs=pairs, pairs_weight=0.4, centring=centring).weight
    np.testing.assert_allclose(found.detach().numpy(), scipy_rotation(all_new, all_old, weights), atol=1e-6)


def test_centring_by_modality():
    new, old, pairs = unit_rows(60, 8).double(), unit_rows(60, 8, 1).double(), as_pairs(20, 8, 8)
    images = pairs.new_images.double(), pairs.old_images.double()
    centred = [torch.cat([a - a.mean(0), b - b.mean(0)]) for a, b in zip((new, old), images, strict=True)]
    weights = np.concatenate([np.full(60, 0.67 / 60), np.full(20, 0.33 / 20)])
    projection = fit_procrustes(new, old, pairs=pairs, centring="modality")
    expected = scipy_rotation(*centred, weights)
    np.testing.assert_allclose(projection.weight.detach().numpy(), expected, atol=1e-6)
    for vectors, target, modality in ((new, old, "text"), (*images, "image")):
        moved = projection.project(vectors.float(), modality)
        torch.testing.assert_close(moved.mean(0), target.float().mean(0), atol=1e-6, rtol=1e-5)
    of_texts = fit_procrustes(new, old, pairs=pairs, centring="modality", pairs_weight=0.0)
    torch.testing.assert_close(of_texts.weight, fit_procrustes(new, old, centring="joint").weight)
    assert of_texts.image_bias is not None


def test_without_weight_pairs_change_nothing():
    new, old, pairs = unit_rows(60, 8), unit_rows(60, 6, 1), as_pairs(20, 8, 6)
    plain, weighted = fit_procrustes(new, old), fit_procrustes(new, old, pairs=pairs)
    assert torch.equal(fit_procrustes(new, old, pairs=pairs, pairs_weight=0.0).weight, plain.weight)
    assert not torch.allclose(weighted.weight, plain.weight, atol=1e-3)
    assert torch.equal(weighted.weight, fit_procrustes(new, old, pairs=pairs, pairs_weight=0.33).weight)


@pytest.mark.parametrize("centring", ["none", "joint"])
def test_scales_are_least_squares_of_each_coordinate(centring):
    new, old = unit_rows(200, 12).double() + 0.1, unit_rows(200, 7, 1).double()
    old = old + 0.5 * new[:, :7]
    plain = fit_procrustes(new, old, centring=centring)
    scaled = fit_procrustes(new, old, centring=centring, scale=True)
    means = (new.mean(0), old.mean(0)) if centring == "joint" else (0.0, 0.0)
    turned = (new - means[0]) @ plain.weight.detach().double().T
    for k in range(7):
        factor = np.linalg.lstsq(turned[:, k : k + 1].numpy(), (old - means[1])[:, k].numpy(), rcond=None)[0]
        expected = float(factor[0]) * plain.weight[k]
        torch.testing.assert_close(scaled.weight[k], expected, atol=1e-6, rtol=1e-5)


def test_is_the_visible_part_of_the_zero_padded_square_solution():
    new, old = unit_rows(200, 12).double(), unit_rows(200, 7, 1).double()
    padded = np.concatenate([old.numpy(), np.zeros((200, 5))], axis=1)
    square, _ = orthogonal_procrustes(new.numpy(), padded)
    projection = fit_procrustes(new, old)
    visible = new.numpy() @ square[:, :7]
    np.testing.assert_allclose(projection.project(new.float()).detach().numpy(), visible, atol=1e-6)
    assert (projection.project(new.float()).norm(dim=1) < 1).all()


DEFICIENT = {
    "fewer rows than dimensions": lambda: (unit_rows(5, 24), unit_rows(5, 16, 1)),
    "one row": lambda: (unit_rows(1, 24), unit_rows(1, 16, 1)),
    "constant": lambda: (unit_rows(1, 24).expand(40, 24), unit_rows(1, 16, 1).expand(40, 16)),
    "duplicates": lambda: (unit_rows(6, 24).repeat(20, 1), unit_rows(6, 16, 1).repeat(20, 1)),
    "dead coordinates": lambda: (unit_rows(99, 24) * (torch.arange(24) % 3 > 0), unit_rows(99, 16, 1)),
    "old in a subspace": lambda: (
        unit_rows(99, 24),
        unit_rows(99, 4, 1) @ orthonormal_columns(16, 4).float().T,
    ),
}


@pytest.mark.parametrize("name", DEFICIENT)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_rank_deficient_problems_have_one_orthonormal_answer(name, swapped, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr("xbt.projections.sources.EXACT_ROWS", 0)
    new, old = DEFICIENT[name]() if not swapped else DEFICIENT[name]()[::-1]
    weight = procrustes_rotation(new, old)
    wide = weight if len(weight) <= weight.shape[1] else weight.T
    torch.testing.assert_close(wide @ wide.T, torch.eye(len(wide)), atol=1e-5, rtol=0)
    assert torch.equal(procrustes_rotation(new, old), weight)
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(procrustes_rotation(new[order], old[order]), weight, atol=1e-4, rtol=0)
    # No other rotation fits better: the trace is the sum of the singular values.
    cross = new.double().T @ old.double()
    best = torch.linalg.svdvals(cross).sum()
    assert (weight.double().T * cross).sum() == pytest.approx(float(best), rel=1e-6)


def decaying(n, dim, least, seed=0):
    """Rows whose standard deviations along the coordinates fall from 1 to the least."""
    drawn = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * torch.logspace(0, float(np.log10(least)), dim, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equals_scipy_on_full_rank_vectors_of_a_decaying_spectrum(dtype):
    # As of 1,203 class names: hardly more rows than dimensions, a common mean, and variances that fall fast.
    new = decaying(300, 128, 1e-3) + 1
    old = new @ orthonormal_columns(128, 128) + 0.3 * decaying(300, 128, 1e-3, 1)
    new, old = (normalize(side, dim=1).numpy().astype(dtype) for side in (new, old))
    projection = fit_procrustes(new, old)
    np.testing.assert_allclose(projection.weight.detach().numpy(), scipy_rotation(new, old), atol=1e-6)
    assert projection.filled == 0


@pytest.mark.parametrize(("offset", "centring"), [(0, "none"), (0, "joint"), (300, "joint")])
def test_recovers_a_rotation_of_which_some_directions_are_small(offset, centring):
    hidden = orthonormal_columns(64, 64)
    new = decaying(1000, 64, 1e-3 if offset == 0 else 1) + offset
    projection = fit_procrustes(new, new @ hidden, centring=centring)
    assert (projection.weight - hidden.T).abs().max() < 1e-6
    assert projection.filled == 0
    assert "filled" not in repr(projection)


def test_tells_how_many_directions_were_filled_up():
    projection = fit_procrustes(unit_rows(5, 24), unit_rows(5, 16, 1))
    assert projection.filled == 11
    assert "24 → 16, filled=11" in repr(projection)
    assert fit_procrustes(unit_rows(5, 24), unit_rows(5, 16, 1), centring="joint").filled == 12


def test_scales_of_small_coordinates_are_known():
    spread = torch.logspace(0, -4, 16, dtype=torch.float64)
    new = orthonormal_columns(500, 16) * spread  # so that the rotation is none
    factors = torch.linspace(0.5, 2, 16, dtype=torch.float64)
    scaled = fit_procrustes(new, new * factors, scale=True)
    torch.testing.assert_close(scaled.weight, torch.diag(factors).float(), atol=1e-5, rtol=1e-4)


def test_unknown_directions_are_cut_or_filled_up():
    new, old = torch.zeros(5, 6), torch.zeros(5, 4)
    new[:, 1], old[:, 0] = 1.0, -1.0
    weight = procrustes_rotation(new, old)
    assert weight[0, 1] == pytest.approx(-1)
    torch.testing.assert_close(weight[2:, 2:4], torch.eye(2), atol=1e-3, rtol=0)
    # Coordinate 1 is taken on the new side: the old one goes to those that are left.
    assert weight[1, [0, 4, 5]].norm() == pytest.approx(1, abs=1e-3)


def test_zero_rows_contribute_nothing_but_not_all_may_be_zero():
    new, old = unit_rows(30, 6), unit_rows(30, 4, 1)
    longer = torch.cat([new, torch.zeros(9, 6)]), torch.cat([old, unit_rows(9, 4, 2)])
    torch.testing.assert_close(procrustes_rotation(*longer), procrustes_rotation(new, old), atol=1e-6, rtol=0)
    with pytest.raises(DataError, match="all zero"):
        fit_procrustes(0 * new, old)


def test_statistics_can_be_used_again():
    new, old, pairs = unit_rows(60, 8), unit_rows(60, 6, 1), as_pairs(20, 8, 6)
    terms = ("cross", "sums", "new_gram")
    texts, images = PairStatistics.of(new, old, terms), PairStatistics.of_images(pairs, terms)
    for options in ({"pairs_weight": 0.2}, {"centring": "modality", "scale": True, "pairs_weight": 0.6}):
        again = fit_procrustes(texts, images, **options)
        fitted = fit_procrustes(new, old, pairs=pairs, **options)
        torch.testing.assert_close(again.weight, fitted.weight)
    mixed = fit_procrustes(texts.mixed(images, 0.2), None)
    assert torch.equal(mixed.weight, fit_procrustes(texts, images, pairs_weight=0.2).weight)
    with pytest.raises(ConfigError, match=r"pairs_weight=0\.5 needs images"):
        fit_procrustes(texts, None, pairs_weight=0.5)


def test_numpy_and_half_precision():
    new, old = unit_rows(300, 24), unit_rows(300, 16, 1)
    exact = procrustes_rotation(new, old)
    half = procrustes_rotation(new.numpy().astype(np.float16), old.numpy().astype(np.float16))
    assert half.dtype == torch.float32
    assert (exact - half).abs().max() < 1e-2


def test_more_rows_than_are_multiplied_in_double_precision(monkeypatch):
    new, old = unit_rows(3000, 24), unit_rows(3000, 16, 1)
    new[:, :16] += old
    whole = procrustes_rotation(new, old)
    monkeypatch.setattr("xbt.projections.sources.BLOCK_ROWS", 128)
    monkeypatch.setattr("xbt.projections.sources.EXACT_ROWS", 256)
    found = procrustes_rotation(new, old)
    assert 0 < (found - whole).abs().max() < 1e-6


def test_fit_projection_attaches_spaces_and_normalises():
    spaces = {"new_space": EmbeddingSpace("new", 24), "old_space": EmbeddingSpace("old", 16)}
    projection = fit_projection(unit_rows(300, 24), unit_rows(300, 16, 1), **spaces)
    assert (projection.new_space, projection.old_space) == (spaces["new_space"], spaces["old_space"])
    out = projection(unit_rows(5, 24))
    assert out.shape == (5, 16)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))


def test_refusals_of_pairs():
    new, old, pairs = unit_rows(30, 8), unit_rows(30, 6, 1), as_pairs(20, 8, 6)
    with pytest.raises(ConfigError, match=r"pairs_weight=0\.5 needs images.*pairs=PairVectors"):
        fit_procrustes(new, old, pairs_weight=0.5)
    with pytest.raises(ConfigError, match=r"centring='modality' needs images.*pairs=PairVectors"):
        fit_procrustes(new, old, centring="modality")
    with pytest.raises(ConfigError, match="centring 'both' is not known; use 'none'"):
        fit_procrustes(new, old, centring="both")
    for weight in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="pairs_weight must be at least 0 and below 1"):
            fit_procrustes(new, old, pairs=pairs, pairs_weight=weight)
    texts_alone = PairVectors(pairs.new_texts, pairs.old_texts, pairs.old_images, range(20))
    with pytest.raises(ConfigError, match="no new image vectors"):
        fit_procrustes(new, old, pairs=texts_alone)
    assert fit_procrustes(new, old, pairs=texts_alone, pairs_weight=0.0).foldable
    for given in (0.0, 0.3):
        with pytest.raises(SpaceMismatchError, match=r"7 \(new\) and 6 \(old\).* 8 and 6"):
            fit_procrustes(new, old, pairs=as_pairs(20, 7, 6), pairs_weight=given)


def test_refusals():
    new, old = unit_rows(30, 24), unit_rows(30, 16, 1)
    with pytest.raises(ConfigError, match=r"'magic' is not known.*procrustes"):
        fit_projection(new, old, method="magic")
    with pytest.raises(DataError, match="30 new and 29 old"):
        fit_projection(new, old[:-1])
    broken = old.clone()
    broken[7, 3] = float("nan")
    with pytest.raises(DataError, match=r"old vectors.*first in row 7"):
        fit_projection(new, broken)
    with pytest.raises(DataError, match="new vectors is empty"):
        fit_projection(new[:0], old[:0])
    with pytest.raises(SpaceMismatchError, match=r"24 → 16.*'old' \(17-d\)"):
        fit_projection(new, old, old_space=EmbeddingSpace("old", 17))
