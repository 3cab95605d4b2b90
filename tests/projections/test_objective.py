"""The noise against its formulas and moments, and the loss of stage 1 against a sum written from its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.batches import Draw
from xbt.errors import ConfigError
from xbt.losses import contrastive_loss, cosine_loss, relational_loss
from xbt.projections import LinearProjection, ResidualProjection
from xbt.projections.closed_form import ProcrustesStart
from xbt.projections.objective import Stage1Options, TextLoss, TextProjectionObjective
from xbt.projections.trainer import NoisyVectors, add_noise

WEIGHTS = ("cosine_weight", "contrastive_weight", "relational_weight")


class Rows:
    """Vectors in memory, as the trained methods read them."""

    def __init__(self, new, old):
        self.new, self.old = new, old
        self.dims = new.shape[1], old.shape[1]

    def __len__(self):
        return len(self.new)

    def take(self, positions):
        return self.new[torch.from_numpy(positions)], self.old[torch.from_numpy(positions)]


def unit(n, dim, shift=0.0):
    return normalize(torch.randn(n, dim) + shift, dim=1)


def noisy_batch(z, noise, family, mean=None):
    """The whole of ``z`` once with noise, next to the rows it was drawn from."""
    data = NoisyVectors(Rows(z, z), np.arange(len(z)), 0, noise, family, mean)
    batch = data.__getitems__([Draw(0, position, position) for position in range(len(z))])
    return batch["old"], batch["new"]


def test_gaussian_noise_has_the_expected_norm_and_changes_the_direction_only():
    clean, noisy = noisy_batch(unit(4096, 64), 0.5, "gaussian")
    torch.testing.assert_close(noisy.norm(dim=1), torch.ones(4096))
    # normalise(z + σ ε) with ‖ε‖² ≈ 1 orthogonal to z: cos ≈ 1 / √(1 + σ²)
    assert (clean * noisy).sum(dim=1).mean() == pytest.approx(1 / math.sqrt(1.25), abs=0.01)


def test_uniform_noise_differs_from_row_to_row():
    """Its tangents are σ u ‖ε‖ with u uniform: mean σ / 2, and spread σ / √12."""
    clean, noisy = noisy_batch(unit(8192, 512), 0.5, "uniform")
    cos = (clean * noisy).sum(dim=1)
    tangent = (1 / cos.square() - 1).clamp(min=0).sqrt()
    assert tangent.mean() == pytest.approx(0.25, abs=0.01)
    assert tangent.std() == pytest.approx(0.5 / math.sqrt(12), abs=0.01)
    _, gaussian = noisy_batch(unit(8192, 512), 0.5, "gaussian")
    assert gaussian.shape == noisy.shape


def test_centred_noise_turns_about_the_mean_and_keeps_the_length_from_it():
    z = unit(4096, 64, shift=0.4)
    mean = z.mean(dim=0)
    clean, noisy = noisy_batch(z, 0.5, "centred", mean)
    before, after = clean - mean, noisy - mean
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-4, atol=1e-6)
    cos = torch.nn.functional.cosine_similarity(before, after)
    assert cos.mean() == pytest.approx(1 / math.sqrt(1.25), abs=0.01)


def test_noise_by_hand():
    z, draw = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    mean, u = torch.tensor([3.0, 0.0]), torch.tensor([[0.5]])
    assert add_noise(z, draw, 0.0) is z
    torch.testing.assert_close(add_noise(z, draw, 2.0), torch.tensor([[5.0, 4.0]]) / math.sqrt(41))
    torch.testing.assert_close(add_noise(z, draw, 2.0, u), torch.tensor([[4.0, 4.0]]) / math.sqrt(32))
    turned = mean + 4 * torch.tensor([[2.0, 1.0]]) / math.sqrt(5)
    torch.testing.assert_close(add_noise(z, draw, 2.0, mean=mean), turned)
    torch.testing.assert_close(
        add_noise(mean[None], draw, 2.0, mean=mean), mean[None]
    )  # a row that is the mean


@pytest.mark.parametrize("weights", [(1.0, 1.0, 100.0), (2.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 3.0)])
def test_loss_is_the_weighted_sum(weights):
    projection = LinearProjection.from_weight(torch.randn(5, 7))
    objective = TextProjectionObjective(
        projection, TextLoss(**dict(zip(WEIGHTS, weights, strict=True)), temperature=0.1)
    )
    new, old = unit(20, 7), unit(20, 5)
    loss, parts = objective({"new": new, "old": old})
    predicted = projection(new)
    terms = (
        cosine_loss(predicted, old), contrastive_loss(predicted, old, torch.tensor(10.0)),
        relational_loss(predicted, old),
    )  # fmt: skip
    assert loss.item() == pytest.approx(
        sum(w * t.item() for w, t in zip(weights, terms, strict=True)), rel=1e-5
    )
    assert set(parts) == {"cosine"} | {
        n for n, w in zip(("contrastive", "relational"), weights[1:], strict=True) if w
    }
    assert not any(part.requires_grad for part in parts.values())
    loss.backward()  # whatever can be trained has a gradient
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_centred_projection_by_hand_and_saved(tmp_path):
    projection = ResidualProjection.seeded(4, 3, seed=0, centred=True, image_means=True)
    means = {
        name: torch.randn(dim)
        for name, dim in (("new_mean", 4), ("old_mean", 3), ("new_image_mean", 4), ("old_image_mean", 3))
    }
    start = ProcrustesStart(torch.randn(3, 4), means)
    projection.init_from(start.rotation, start.means)
    with torch.no_grad():
        projection.scale.fill_(0.7)
    z = torch.randn(6, 4)
    for modality, which in ((None, "mean"), ("text", "mean"), ("image", "image_mean")):
        new, old = f"new_{which}", f"old_{which}"
        centred = z - means[new]
        expected = centred @ start.rotation.T + 0.7 * projection.mlp(centred) + means[old]
        torch.testing.assert_close(projection.project(z, modality), expected)
    projection.save_pretrained(tmp_path)
    loaded = ResidualProjection.from_pretrained(tmp_path)
    assert loaded.options() == {"hidden_dim": 8, "centred": True, "image_means": True}
    for modality in ("text", "image"):
        assert torch.equal(loaded(z, modality), projection(z, modality))


def test_images_without_means_of_their_own_take_those_of_the_texts():
    projection = ResidualProjection.seeded(4, 3, seed=0, centred=True)
    projection.init_from(torch.randn(3, 4), {"new_mean": torch.randn(4), "old_mean": torch.randn(3)})
    z = torch.randn(6, 4)
    assert torch.equal(projection(z, "image"), projection(z, "text"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TextLoss(cosine_weight=-1.0), "cosine_weight must be a number of at least 0, got -1"),
        (lambda: TextLoss(relational_weight=math.nan), "relational_weight"),
        (lambda: TextLoss(**dict.fromkeys(WEIGHTS, 0.0)), "are all 0"),
        (lambda: TextLoss(temperature=2.0), r"temperature must lie in \[0.01, 1\], got 2"),
        (lambda: Stage1Options(noise=-0.1), "noise must not be negative or infinite, got -0.1"),
        (lambda: Stage1Options(noise_family="pink"), "noise_family 'pink' is not known; there is gaussian"),
        (lambda: ResidualProjection(3, 3, -1), "hidden_dim must not be negative, got -1"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
