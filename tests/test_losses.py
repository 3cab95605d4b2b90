from __future__ import annotations

import math
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from xbt.losses import Temperature, contrastive_loss, cosine_loss, gather_rows, relational_loss


def numpy_info_nce(a, b, scale):
    """Written from the definition, in fp64 and loops."""
    scores = scale * a.astype(np.float64) @ b.astype(np.float64).T
    total = 0.0
    for i in range(len(a)):
        total -= scores[i, i] - np.log(np.exp(scores[i]).sum())
        total -= scores[i, i] - np.log(np.exp(scores[:, i]).sum())
    return total / (2 * len(a))


def test_contrastive_loss_equals_its_definition():
    a, b = (normalize(torch.randn(9, 5), dim=1) for _ in range(2))
    for scale in (1.0, 14.3, 100.0):
        ours = contrastive_loss(a, b, torch.tensor(scale)).item()
        assert math.isclose(ours, numpy_info_nce(a.numpy(), b.numpy(), scale), rel_tol=1e-5)


def test_contrastive_loss_is_symmetric_and_log_n_without_information():
    a, b = (normalize(torch.randn(9, 5), dim=1) for _ in range(2))
    one, two = contrastive_loss(a, b, torch.tensor(10.0)), contrastive_loss(b, a, torch.tensor(10.0))
    torch.testing.assert_close(one, two)
    same = torch.ones(8, 4) / 2
    assert math.isclose(contrastive_loss(same, same, torch.tensor(10.0)).item(), math.log(8), rel_tol=1e-6)


def test_contrastive_loss_keeps_fp32_under_autocast():
    a, b = (normalize(torch.randn(64, 32), dim=1) for _ in range(2))
    exact = contrastive_loss(a, b, torch.tensor(100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(a, b, torch.tensor(100.0)), exact)


def test_cosine_loss():
    a = normalize(torch.randn(6, 4), dim=1)
    assert cosine_loss(a, a).abs() < 1e-6
    assert abs(cosine_loss(a, -a) - 2) < 1e-6


def test_gather_is_the_identity_in_one_process():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


def test_temperature_stays_within_clips_bounds():
    temperature = Temperature(0.07)
    assert math.isclose(temperature().item(), 1 / 0.07, rel_tol=1e-5)
    with torch.no_grad():
        temperature.log_scale.fill_(9.0)
        assert math.isclose(temperature().item(), 100.0, rel_tol=1e-5)
        temperature.log_scale.fill_(-3.0)
        assert temperature().item() == 1.0


def test_contrastive_loss_with_fixed_targets_takes_a_shorter_way_to_the_same():
    """Where no gradient flows into the second rows, one product serves both directions."""
    a, b = (normalize(torch.randn(33, 7, dtype=torch.float64), dim=1).float() for _ in range(2))
    results = []
    for fixed in (True, False):
        rows, scale = a.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)
        loss = contrastive_loss(rows, b.clone().requires_grad_(not fixed), scale)
        loss.backward()
        results.append((loss.detach(), rows.grad, scale.grad))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_relational_loss_equals_its_definition():
    a, b = (normalize(torch.randn(40, 6, dtype=torch.float64), dim=1) for _ in range(2))
    for target in (b, normalize(a + 1e-3 * b, dim=1)):  # far away, and so near that a difference would cancel
        rows = a.float().requires_grad_()
        exact_rows = rows.detach().double().requires_grad_()
        wanted = target.float()
        loss = relational_loss(rows, wanted)
        wide = wanted.double()
        exact = (exact_rows @ exact_rows.T - wide @ wide.T).square().mean()
        assert math.isclose(loss.item(), exact.item(), rel_tol=1e-4)
        loss.backward()
        exact.backward()
        assert (rows.grad - exact_rows.grad).norm() <= 1e-4 * exact_rows.grad.norm()
    assert relational_loss(wanted, wanted) == 0


def test_relational_loss_knows_similarities_only():
    rows = normalize(torch.randn(40, 6), dim=1)
    turned = rows @ torch.linalg.qr(torch.randn(6, 6))[0]
    assert relational_loss(turned, rows).abs() < 1e-6
    assert relational_loss(-rows, rows).abs() < 1e-6
    assert relational_loss(rows.roll(1, 0), rows) > 0.01


def test_relational_loss_looks_at_the_first_rows_of_a_large_batch():
    a, b = (normalize(torch.randn(30, 6), dim=1) for _ in range(2))
    assert torch.equal(relational_loss(a, b, max_rows=10), relational_loss(a[:10], b[:10]))
    assert not torch.equal(relational_loss(a, b, max_rows=10), relational_loss(a, b))


def mapped_loss(name, new, old, weight):
    """A loss of rows that a matrix makes, and the matrix' gradient: what a training step needs."""
    weight = weight.clone().requires_grad_()
    rows = normalize(new @ weight, dim=1)
    if name == "contrastive":
        loss = contrastive_loss(rows, old, torch.tensor(10.0))
    else:
        loss = relational_loss(rows, old, max_rows=18 if name == "relational, cut" else 512)
    loss.backward()
    return torch.cat([loss.detach()[None], weight.grad.flatten()])


def process(rank, world, meeting, name, new, old, weight, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    own = slice(rank * len(new) // world, (rank + 1) * len(new) // world)
    result = mapped_loss(name, new[own], old[own], weight)
    dist.all_reduce(result)  # as DDP averages gradients
    results.put((result / world).numpy())
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["contrastive", "relational", "relational, cut"])
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, name):
    new, old = torch.randn(24, 5), normalize(torch.randn(24, 4), dim=1)
    weight = torch.randn(5, 4)
    alone = mapped_loss(name, new, old, weight).numpy()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=process, args=(rank, 2, tmp_path / "m", name, new, old, weight, results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    for result in found:
        np.testing.assert_allclose(result, alone, rtol=1e-4, atol=1e-6)
