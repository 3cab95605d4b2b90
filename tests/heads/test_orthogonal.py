"""Orthogonal layers stay orthogonal, whichever map and however they are trained."""

from __future__ import annotations

import copy

import pytest
import torch

from xbt.errors import ConfigError
from xbt.heads import BT2Head, OCAHead
from xbt.heads.orthogonal import (
    ORTHOGONAL_MAPS,
    assign,
    complement,
    nearest_orthonormal,
    orthogonal_linear,
)

TOLERANCE = 5e-6


def distance(matrix):
    matrix = matrix.detach()
    return float((matrix @ matrix.T - torch.eye(len(matrix)).to(matrix)).abs().max())


def rotations(head):
    return [head.rotation] if head.kind == "oca" else [head.new_rotation, head.old_rotation]


@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
@pytest.mark.parametrize("kind", ["bt2", "oca"])
def test_stays_orthogonal_with_the_same_sign(orthogonal_map, kind, train):
    if kind == "bt2":
        head = BT2Head(24, 20, 6, n_classes=5, orthogonal_map=orthogonal_map)
    else:
        head = OCAHead(20, 6, n_classes=5, orthogonal_map=orthogonal_map)
    assert all(distance(each.weight) <= TOLERANCE for each in rotations(head))
    start = [each.weight.detach().clone() for each in rotations(head)]
    signs = [torch.linalg.det(each).sign() for each in start]

    def seen():
        assert [torch.linalg.det(each.weight).sign() for each in rotations(head)] == signs

    train(head, steps=60, seen=seen)
    for each, before in zip(rotations(head), start, strict=True):
        assert distance(each.weight) <= TOLERANCE
        assert (each.weight - before).abs().max() > 0.05  # it has been trained


@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
def test_double_precision_is_orthogonal_to_its_rounding(orthogonal_map):
    layer = orthogonal_linear(16, orthogonal_map).double()
    assign(layer, torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0])
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        layer.weight[0].sum().backward()
        optimizer.step()
    assert distance(layer.weight) <= 1e-12


@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
@pytest.mark.parametrize("dim", [1, 2, 33])
def test_a_matrix_can_be_assigned_and_trained_from(orthogonal_map, dim):
    layer = orthogonal_linear(dim, orthogonal_map)
    matrix = torch.linalg.qr(torch.randn(dim, dim))[0]
    for wanted in (matrix, matrix.flip(0)):  # both signs of the determinant
        assign(layer, wanted)
        torch.testing.assert_close(layer.weight, wanted, rtol=0, atol=2e-6)
    copied = copy.deepcopy(layer)
    if dim == 1:
        return  # there is nothing to turn
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    layer.weight.sum().backward()
    optimizer.step()
    assert (layer.weight - matrix.flip(0)).abs().max() > 1e-4
    assert torch.equal(copied.weight, copied.weight)
    torch.testing.assert_close(copied.weight, matrix.flip(0), rtol=0, atol=2e-6)


def test_there_is_no_bias():
    assert orthogonal_linear(4).bias is None


def test_what_is_not_orthogonal_or_does_not_fit_is_refused():
    layer = orthogonal_linear(4)
    before = layer.weight.detach().clone()
    with pytest.raises(ConfigError, match=r"not orthogonal: R Rᵀ differs from the identity by 3"):
        assign(layer, 2 * torch.eye(4))
    with pytest.raises(ConfigError, match="differs from the identity by nan"):
        assign(layer, torch.full((4, 4), torch.nan))
    with pytest.raises(ConfigError, match=r"shape \(3, 3\), but \(4, 4\) is needed"):
        assign(layer, torch.eye(3))
    assert torch.equal(layer.weight, before)
    with pytest.raises(ConfigError, match="orthogonal_map None is not known"):
        orthogonal_linear(4, None)


@pytest.mark.parametrize("shape", [(3, 7), (7, 7), (0, 4), (7, 3)])
def test_complement_spans_the_rest(shape):
    rows = torch.randn(shape, dtype=torch.float64)
    rest = complement(rows)
    assert rest.shape == (max(shape[1] - shape[0], 0), shape[1])
    if len(rest):
        assert distance(rest) < 1e-12
    if shape[0]:
        assert (rows @ rest.T).abs().max() < 1e-12 if len(rest) else True
    assert len(complement(torch.zeros(2, 4))) == 4


def test_nearest_orthonormal_rows_are_the_rows_themselves_where_they_are():
    rows = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0].T
    torch.testing.assert_close(nearest_orthonormal(rows), rows)
    torch.testing.assert_close(nearest_orthonormal(3 * rows), rows)
    assert nearest_orthonormal(rows[:0]).shape == (0, 6)
