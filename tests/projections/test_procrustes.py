from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections import fit_projection, procrustes_rotation, procrustes_rotation_of_chunks
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


def test_recovers_an_embedding_into_more_dimensions():
    hidden = orthonormal_columns(48, 32)
    new = unit_rows(500, 32).double()
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


def test_numpy_and_half_precision():
    new, old = unit_rows(300, 24), unit_rows(300, 16, 1)
    exact = procrustes_rotation(new, old)
    half = procrustes_rotation(new.numpy().astype(np.float16), old.numpy().astype(np.float16))
    assert half.dtype == torch.float32
    assert (exact - half).abs().max() < 1e-2


def test_more_rows_than_one_chunk(monkeypatch):
    new, old = unit_rows(300, 24), unit_rows(300, 16, 1)
    whole = procrustes_rotation(new, old)
    monkeypatch.setattr("xbt.projections.procrustes._CHUNK_ROWS", 7)
    assert (procrustes_rotation(new, old) - whole).abs().max() < 1e-6


def test_fit_projection_attaches_spaces_and_normalises():
    spaces = {"new_space": EmbeddingSpace("new", 24), "old_space": EmbeddingSpace("old", 16)}
    projection = fit_projection(unit_rows(300, 24), unit_rows(300, 16, 1), **spaces)
    assert (projection.new_space, projection.old_space) == (spaces["new_space"], spaces["old_space"])
    out = projection(unit_rows(5, 24))
    assert out.shape == (5, 16)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))


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
