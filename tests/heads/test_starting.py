"""A head that starts from a known map gives the old vectors of that map before it is trained."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from xbt.errors import ConfigError, DataError
from xbt.heads import BCTHead, BT2Head, OCAHead, PlainHead
from xbt.heads.orthogonal import ORTHOGONAL_MAPS


def frame(rows, columns, seed=0):
    """A map of orthonormal rows, or columns if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis = torch.linalg.qr(tall)[0]
    return basis if rows >= columns else basis.T


def inputs(dim, n=60):
    return normalize(torch.randn(n, dim), dim=1)


def cosines(head, weight, x, order=None):
    output = head(x @ head.init_from(weight, order).T)
    return cosine_similarity(output.compatible, x @ weight.T, dim=1)


@pytest.mark.parametrize(
    ("head", "new_dim"),
    [
        (BCTHead(12, 8), 12),
        (BCTHead(8, 8, 2), 12),
        (BCTHead(12, 8, 6), 12),
        (OCAHead(8, 4), 12),
        (OCAHead(8, 0), 12),
        (OCAHead(8, 9), 12),
        (OCAHead(8, 4, orthogonal=False), 5),
    ],
    ids=str,
)
def test_bct_and_oca_begin_at_the_map_itself(head, new_dim):
    weight, x = frame(8, new_dim), inputs(new_dim)
    start = head.init_from(weight)
    assert start.shape == (head.in_dim, new_dim)
    assert start.dtype == torch.float32
    assert torch.equal(start[:8], weight)
    assert cosines(head, weight, x).min() > 0.9999
    rest = start[8:]
    assert (rest @ weight.T).abs().max() < 1e-5 if len(rest) and new_dim > 8 else True
    fitting_rows = min(max(new_dim - 8, 0), len(rest))
    torch.testing.assert_close(rest @ rest.T, torch.diag((torch.arange(len(rest)) < fitting_rows).float()))
    if head.in_dim >= new_dim >= 8:  # nothing of x is lost
        torch.testing.assert_close((x @ start.T) @ (x @ start.T).T, x @ x.T)


@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
@pytest.mark.parametrize("dims", [(12, 8), (8, 8), (1, 1)])
def test_bt2_without_extra_dimensions_is_exact(dims, orthogonal_map):
    head = BT2Head(*dims, 0, orthogonal_map=orthogonal_map)
    weight, x = frame(dims[1], dims[0]), inputs(dims[0])
    order = frame(dims[1], dims[1], 3)
    for each in (None, order):
        assert cosines(head, weight, x, each).min() > 0.99999
    output = head(x @ head.init_from(weight).T)
    torch.testing.assert_close(output.compatible, 2 * x @ weight.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.features, x)


@pytest.mark.parametrize("dims", [(20, 16, 4), (16, 16, 8), (24, 16, 12), (16, 16, 16), (12, 16, 8)])
def test_bt2_is_exact_but_for_the_least_important_directions(dims):
    new_dim, old_dim, extra = dims
    head = BT2Head(*dims)
    weight, x = frame(old_dim, new_dim), inputs(new_dim)
    order = frame(old_dim, old_dim, 3)
    if new_dim < old_dim:
        order = None
    output = head(x @ head.init_from(weight, order).T)
    basis = head.old_rotation.weight.detach()
    if order is not None:
        torch.testing.assert_close(basis, order, atol=1e-5, rtol=0)
    got, wanted = output.compatible @ basis, 2 * x @ weight.T @ basis
    torch.testing.assert_close(got[:, extra:], wanted[:, extra:], atol=1e-5, rtol=0)
    assert torch.equal(output.features.argmax(), x.argmax())
    # Of the others, the most important o can carry begin at the right direction.
    carried = min(extra, old_dim // 2)
    direction = cosine_similarity(got[:, extra - carried : extra], wanted[:, extra - carried : extra], dim=1)
    if new_dim >= old_dim:
        assert direction.min() > 0.999


def test_bt2_is_near_where_the_least_important_directions_hardly_matter():
    weight, order = frame(16, 20), frame(16, 16, 3)
    size = torch.cat([torch.full((4,), 0.1), torch.ones(12)])
    x = normalize(torch.randn(60, 16) * size, dim=1) @ order.T @ weight
    head = BT2Head(20, 16, 4)
    assert cosines(head, weight, x, order).min() > 0.88
    assert cosines(BT2Head(20, 16, 4, scale=5.0), weight, x, order).min() > 0.97
    # o has length 1 beside 2 of the rest: best is where the first directions hold a fifth of the squares.
    size = torch.cat([torch.full((4,), 0.75**0.5), torch.ones(12)])
    even = normalize(torch.randn(60, 16) * size, dim=1) @ order.T @ weight
    assert cosines(head, weight, even, order).mean() > 0.98


def test_the_default_order_gives_up_the_last_coordinates():
    head = BT2Head(12, 8, 3)
    head.init_from(frame(8, 12))
    torch.testing.assert_close(head.old_rotation.weight.detach(), torch.eye(8).flip(1))


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_start_can_be_trained_from(extra, train):
    head = BT2Head(6, 3, extra, n_classes=5)
    head.init_from(frame(3, 6))
    before = head.new_rotation.weight.detach().clone()
    train(head, steps=3)
    assert all(torch.isfinite(each).all() for each in head.parameters())
    assert (head.new_rotation.weight - before).abs().max() > 1e-3


@pytest.mark.parametrize("dims", [(3, 1, 1), (6, 10, 4)])
def test_where_there_is_nothing_to_carry_the_code_begins_at_a_constant(dims):
    head = BT2Head(*dims)
    h = inputs(dims[0]) @ head.init_from(frame(dims[1], dims[0])).T
    output = head(h)
    torch.testing.assert_close(head.code(h.relu()), torch.ones(60, dims[2]))
    output.full.sum().backward()
    assert head.code.weight.grad.abs().max() < 100


def test_more_old_dimensions_than_new_ones_are_taken_as_far_as_they_go():
    weight, x = frame(10, 6), inputs(6)
    head = BT2Head(6, 10, 4, scale=5.0)
    assert cosines(head, weight, x).min() > 0.95
    assert cosines(BCTHead(6, 10, 4), weight, x).min() > 0.9999


def test_a_map_that_does_not_fit_is_refused():
    head = BT2Head(6, 4, 1)
    with pytest.raises(ConfigError, match="leads to 3 dimensions, but the head's old model has 4"):
        head.init_from(frame(3, 6))
    with pytest.raises(ConfigError, match="takes 5 dimensions, but the head's new_dim is 6"):
        head.init_from(frame(4, 5))
    with pytest.raises(ConfigError, match=r"order must be an orthogonal 4 × 4 matrix .* got shape \(4, 3\)"):
        head.init_from(frame(4, 6), frame(4, 3))
    with pytest.raises(ConfigError, match="order must be an orthogonal 4 × 4 matrix"):
        head.init_from(frame(4, 6), 2 * torch.eye(4))
    with pytest.raises(DataError, match="the initial map has NaN"):
        head.init_from(torch.full((4, 6), torch.nan))
    with pytest.raises(ConfigError, match="has no old model, so it cannot be initialised from a map"):
        PlainHead(4).init_from(frame(4, 4))
