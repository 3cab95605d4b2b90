from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import DataError, SpaceMismatchError
from xbt.vectors import as_vectors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_and_single_precision_become_float32(dtype):
    given = torch.tensor([[0.5, -2.0]], dtype=dtype)
    result = as_vectors(given, "x")
    assert result.dtype == torch.float32
    assert result.tolist() == [[0.5, -2.0]]


def test_double_precision_stays():
    value = 1 + 1e-12
    assert as_vectors(torch.tensor([[value]], dtype=torch.float64), "x").item() == value
    assert as_vectors(np.array([[value]]), "x").item() == value


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_numpy_arrays_become_tensors(dtype):
    result = as_vectors(np.array([[1.0, 2.0], [3.0, 4.0]], dtype), "x", dim=2)
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float32
    assert result.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_the_result_is_detached():
    assert not as_vectors(torch.ones(2, 2, requires_grad=True) * 2, "x").requires_grad


@pytest.mark.parametrize("given", [torch.ones(2, 2, dtype=torch.int64), np.ones((2, 2), bool)])
def test_refuses_what_is_not_floating_point(given):
    with pytest.raises(DataError, match="captions must be floating point"):
        as_vectors(given, "captions")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (3, 0), ()])
def test_refuses_other_shapes(shape):
    with pytest.raises(DataError, match=r"x must have the shape \(n, dim\)"):
        as_vectors(torch.ones(shape), "x")


def test_refuses_no_rows():
    with pytest.raises(DataError, match="x is empty"):
        as_vectors(torch.empty(0, 3), "x")


def test_refuses_another_dimension():
    with pytest.raises(SpaceMismatchError, match="x has dimension 3, but 4 is needed"):
        as_vectors(torch.ones(2, 3), "x", dim=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_and_counts_values_that_are_not_finite(bad):
    vectors = torch.ones(5, 3)
    vectors[2, 1] = vectors[4, 0] = bad
    with pytest.raises(DataError, match=r"x has NaN or infinite values in 2 of 5 rows, first in row 2"):
        as_vectors(vectors, "x")


def test_any_numpy_layout():
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    frozen = rows.copy()
    frozen.setflags(write=False)
    for variant in (rows.astype(">f4"), rows[::-1, ::-1][::-1, ::-1], np.asfortranarray(rows), frozen):
        assert torch.equal(as_vectors(variant, "rows"), torch.from_numpy(rows))
