from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import DataError, SpaceMismatchError
from xbt.vectors import as_vectors, unit_rows


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


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *((torch.float16, exponent) for exponent in (-2, 0, 4)),
        *(
            (kind, exponent)
            for kind in (torch.float32, torch.bfloat16)
            for exponent in (-35, -20, 0, 19, 30, 38)
        ),
        *((torch.float64, exponent) for exponent in (-300, -38, 0, 38, 300)),
    ],
)
def test_unit_rows_are_right_at_every_length(dtype, exponent):
    rows = np.random.default_rng(0).uniform(0.1, 1, (6, 5)) * np.array([1, -1, 1, -1, 1])
    scaled = rows * 10.0**exponent
    given = torch.from_numpy(scaled).to(dtype)
    exact = given.double().numpy() / scaled.max()
    expected = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(unit_rows(given).double().numpy(), expected, atol=4 * torch.finfo(dtype).eps)


def test_unit_rows_leave_usual_rows_as_torch_does_and_zeros_as_zeros():
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    assert torch.equal(unit_rows(rows), torch.nn.functional.normalize(rows, dim=1))
    assert torch.equal(unit_rows(rows[0]), unit_rows(rows)[0])
    rows.requires_grad_()
    unit_rows(rows)[:, 0].sum().backward()
    ours, rows.grad = rows.grad.clone(), None
    torch.nn.functional.normalize(rows, dim=1)[:, 0].sum().backward()
    kept = [row for row in range(50) if row != 3]
    torch.testing.assert_close(ours[kept], rows.grad[kept])


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(2, 3).to("meta"), torch.eye(3).to_sparse(), torch.ones(2, 3, dtype=torch.complex64),
        np.ones((2, 3), np.complex128), np.ma.masked_array(np.ones((2, 3)), mask=np.eye(2, 3)),
        [[1.0], [1.0, 2.0]], [["a"]], None, {"a": 1.0}, [[10**400]],
        np.full((2, 3), np.longdouble("1e4000")), np.array([["a"]]), iter([1.0]),
    ],
    ids=lambda given: str(given)[:20],
)  # fmt: skip
def test_whatever_is_no_array_of_floats_is_refused_in_words(given):
    with pytest.raises(DataError, match="x "):
        as_vectors(given, "x")


def test_extended_precision_is_read_as_double():
    rows = np.linspace(0, 1, 12, dtype=np.longdouble).reshape(4, 3)
    found = as_vectors(rows, "x")
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), rows.astype(np.float64))
