from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import normalize

from xbt.losses import Temperature, contrastive_loss, cosine_loss, gather_rows


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
