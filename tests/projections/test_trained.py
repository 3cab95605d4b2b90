"""Trained residual maps: they start at the closed form, and a later step is kept only if it is better."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import gelu, normalize

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections import Projection, ResidualProjection, fit_procrustes, fit_projection
from xbt.projections.objective import JointObjective, TextLoss, TextProjectionObjective
from xbt.projections.pairs import PairVectors
from xbt.projections.trainer import pairs_score, text_hits
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

QUICK = {"hidden_dim": 64, "batch_size": 128, "lr": 3e-3, "warmup_steps": 5, "eval_every": 20, "noise": 0.2}


MLP_QUICK = {"hidden_dim": 32, "batch_size": 256, "lr": 3e-3, "warmup_steps": 5, "eval_every": 25}


def fit_xbt(new, old, **options):
    return fit_projection(new, old, "xbt", **options)


def fit_mlp(new, old, **options):
    return fit_projection(new, old, "mlp", **options)


def texts(n=900, new_dim=24, old_dim=16, seed=0):
    """New vectors that are a bent view of the old ones: more than a rotation can undo."""
    generator = torch.Generator().manual_seed(seed)
    old = normalize(torch.randn(n, old_dim, generator=generator), dim=1)
    law = torch.Generator().manual_seed(99)  # one for all rows of these dimensions
    frame = torch.linalg.qr(torch.randn(max(new_dim, old_dim), old_dim, generator=law))[0][:new_dim]
    bent = torch.tanh(4 * old * torch.logspace(0, -1.5, old_dim)) @ frame.T
    return normalize(bent + 0.03 * torch.randn(n, new_dim, generator=generator), dim=1), old


def world_of_pairs(n=200, seed=1):
    """Images and texts of the same things, in cones of their own; two texts an image."""
    new, old = texts(n, seed=seed)
    owner = torch.arange(2 * n) // 2
    generator = torch.Generator().manual_seed(seed)

    def near(rows, amount):
        return rows + amount * torch.randn(rows.shape, generator=generator)

    new_texts, old_texts = near(new[owner], 0.05), near(old[owner], 0.05)
    return PairVectors(new_texts, old_texts, near(old, 0.05), owner, near(new, 0.05))


def numpy_rotation(new, old):
    """The rectangular solution, which scipy does not know; for new_dim ≥ old_dim."""
    u, _, vt = np.linalg.svd(new.double().numpy().T @ old.double().numpy(), full_matrices=False)
    return u @ vt


def test_without_steps_it_is_the_procrustes_rotation():
    new, old = texts(new_dim=16)
    expected, _ = orthogonal_procrustes(new.double().numpy(), old.double().numpy())
    projection = fit_xbt(new, old, steps=0)
    assert (projection(new).double() - new.double() @ torch.from_numpy(expected)).abs().max() < 1e-5
    assert projection.scale == 0
    assert not projection.training
    for rows in (texts(), texts(12), texts(1), texts(new_dim=8)):
        torch.testing.assert_close(fit_xbt(*rows, steps=0)(rows[0]), fit_procrustes(*rows)(rows[0]))


def test_without_steps_pairs_and_means_enter_the_closed_form():
    (new, old), pairs = texts(), world_of_pairs()
    joint = fit_xbt(new, old, steps=0, pairs=pairs, pairs_weight=0.4)
    # The same covariance from rows that are repeated as often as they weigh.
    text, image = (0.6 / len(new)) ** 0.5, (0.4 / len(pairs)) ** 0.5
    sides = (new, pairs.new_images), (old, pairs.old_images)
    stacked = [torch.cat([text * texts_of, image * images_of]) for texts_of, images_of in sides]
    expected = torch.from_numpy(numpy_rotation(*stacked).T)
    torch.testing.assert_close(joint.weight.double(), expected, atol=1e-5, rtol=0)
    ignored = fit_xbt(new, old, steps=0, pairs=pairs, pairs_weight=0.0)
    assert torch.equal(ignored.weight, fit_xbt(new, old, steps=0).weight)

    shifted = normalize(new + 0.5, dim=1), normalize(old - 0.7, dim=1)
    centred = fit_xbt(*shifted, steps=0, noise_family="centred")
    means = [side.double().mean(dim=0) for side in shifted]
    rotation = torch.from_numpy(numpy_rotation(shifted[0] - means[0], shifted[1] - means[1]))
    expected = normalize((shifted[0] - means[0]) @ rotation + means[1], dim=1)
    torch.testing.assert_close(centred(shifted[0]).double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(centred(shifted[0], "image"), centred(shifted[0], "text"))
    both = fit_xbt(*shifted, steps=0, noise_family="centred", pairs=pairs)
    torch.testing.assert_close(both.new_image_mean, pairs.new_images.mean(dim=0))
    torch.testing.assert_close(both.old_image_mean, pairs.old_images.mean(dim=0))


@pytest.mark.parametrize("family", ["gaussian", "uniform", "centred"])
def test_training_improves_what_was_never_seen(family):
    new, old = texts(1500)
    closed = fit_xbt(new[:1200], old[:1200], steps=0)
    trained = fit_xbt(new[:1200], old[:1200], steps=200, noise_family=family, **QUICK)
    assert trained.scale != 0
    before, after = (text_hits(each, new[1200:], old[1200:]).mean() for each in (closed, trained))
    assert after > before + 0.05
    if family != "centred":
        torch.testing.assert_close(trained.weight, closed.weight, atol=0.2, rtol=0)
        assert fit_xbt(new, old, steps=40, train_rotation=True, **QUICK).weight.requires_grad


def test_step_zero_is_kept_when_the_learning_rate_wrecks_it():
    new, old = texts()
    wrecked = fit_xbt(new, old, steps=20, **{**QUICK, "lr": 30.0})
    assert wrecked.scale == 0
    assert torch.equal(wrecked.weight, fit_xbt(new, old, steps=0).weight)  # of all rows again


def test_pairs_improve_retrieval_that_was_never_seen():
    new, old = texts()
    pairs = world_of_pairs(500)
    seen, unseen = pairs.subset(range(350)), pairs.subset(range(350, 500))
    closed = fit_xbt(new, old, steps=0, pairs=seen)
    trained = fit_xbt(new, old, steps=120, pairs=seen, **QUICK)
    assert pairs_score(trained, unseen) > pairs_score(closed, unseen) + 0.02
    texts_only = PairVectors(seen.new_texts, seen.old_texts, seen.old_images, seen.image_of_text)
    one_way = fit_xbt(new, old, steps=40, pairs=texts_only, **QUICK)
    assert pairs_score(one_way, unseen) > 0.5


def test_joint_loss_by_hand():
    new, old = texts(40)
    pairs = world_of_pairs(6)
    projection = fit_procrustes(new, old)
    text = TextProjectionObjective(projection, TextLoss())
    joint = JointObjective(text, pairs, 0.3, temperature=0.1, batch_size=1000, seed=0)
    loss, parts = joint({"new": new, "old": old})
    with torch.no_grad():
        queries, images = projection(pairs.new_texts), projection(pairs.new_images)
        to_images = (10 * queries @ pairs.old_images.T).softmax(dim=1)
        to_texts = (10 * images @ pairs.old_texts.T).softmax(dim=1)
        t2i = -np.mean([to_images[i, i // 2].log().item() for i in range(12)])
        i2t = -np.mean([(to_texts[i, 2 * i] + to_texts[i, 2 * i + 1]).log().item() for i in range(6)])
        cosine = (1 - (images * pairs.old_images).sum(dim=1)).mean().item()
    assert parts["t2i"] == pytest.approx(t2i, rel=1e-4)
    assert parts["i2t"] == pytest.approx(i2t, rel=1e-4)
    assert parts["image"] == pytest.approx(cosine, rel=1e-4)
    expected = 0.7 * text({"new": new, "old": old})[0].item() + 0.3 * (t2i + i2t + cosine)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert not [name for name in joint.state_dict() if "images" in name]


def test_seed_fixes_every_byte_and_nothing_global_moves():
    new, old = texts(300)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = fit_xbt(new, old, steps=20, pairs=world_of_pairs(30), **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    second = fit_xbt(new, old, steps=20, pairs=world_of_pairs(30), **QUICK)
    other = fit_xbt(new, old, steps=20, pairs=world_of_pairs(30), seed=1, **QUICK)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.mlp[0].weight, other.mlp[0].weight)


def test_stores_give_what_tensors_give(tmp_path):
    new, old = texts(200)
    for name, rows in (("new", new), ("old", old)):
        space = EmbeddingSpace(name, rows.shape[1])
        store = EmbeddingStore.create(tmp_path / name, modality="text", dtype="float32", space=space)
        store.append(rows.numpy(), [str(row) for row in range(200)])
    stores = [EmbeddingStore.open(tmp_path / name) for name in ("new", "old")]
    from_stores = fit_xbt(*stores, steps=10, **QUICK)
    from_tensors = fit_xbt(new, old, steps=10, **QUICK)
    for name, tensor in from_tensors.state_dict().items():
        assert torch.equal(tensor, from_stores.state_dict()[name]), name


def test_saved_and_loaded(tmp_path):
    new, old = texts(300)
    projection = fit_xbt(new, old, steps=40, noise_family="centred", pairs=world_of_pairs(30), **QUICK)
    projection.save_pretrained(tmp_path)
    loaded = Projection.from_pretrained(tmp_path)
    for modality in ("text", "image"):
        assert torch.equal(loaded(new, modality), projection(new, modality))


@pytest.mark.parametrize("dims", [(1, 1), (1, 4), (4, 1)])
def test_dimensions_of_one(dims):
    new, old = torch.randn(40, dims[0]), torch.randn(40, dims[1])
    old[:, 0] += 2 * new[:, 0]
    projection = fit_xbt(normalize(new, dim=1), normalize(old, dim=1), steps=5, **QUICK)
    assert projection(new).isfinite().all()
    assert fit_mlp(normalize(new, dim=1), normalize(old, dim=1), steps=5, **MLP_QUICK)(new).isfinite().all()
    torch.testing.assert_close(projection(new).norm(dim=1), torch.ones(40))


def test_constant_rows_keep_the_closed_form():
    row = torch.ones(50, 4) / 2
    for family in ("gaussian", "centred"):
        projection = fit_xbt(row, row, steps=5, noise_family=family, **QUICK)
        torch.testing.assert_close(projection(row), row)
        assert projection.scale == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n": 4}, DataError, "at least 5 rows.*got 4"),
        ({"nan": 17}, DataError, "new vectors has NaN.*row 17"),
        ({"short": True}, DataError, "there are 99 new and 100 old rows"),
        ({"noise": -1.0}, ConfigError, "noise must not be negative"),
        ({"noise_family": "pink"}, ConfigError, "noise_family 'pink'"),
        ({"pairs_weight": 0.5}, ConfigError, "pairs_weight is 0.5, but there are no pairs"),
        (
            {"pairs_weight": 1.0, "pairs": 20},
            ConfigError,
            "pairs_weight must be at least 0 and below 1, got 1",
        ),
        ({"pairs": 4}, DataError, "at least 5 images in the pairs"),
        ({"hidden_dim": -3}, ConfigError, "hidden_dim must not be negative, got -3"),
        ({"steps": -1}, ConfigError, "steps must be at least 0"),
        (
            {"pairs": 20, "new_dim": 20},
            SpaceMismatchError,
            r"vectors of 24 .new. and 16 .old. dimensions, .* have 20 and 16",
        ),
        ({"lr": 1e30, "grad_clip": 0.0, "cosine_weight": 1e38}, DataError, "NaN or infinite at step"),
    ],
)
def test_wrong_input_is_one_sentence(change, error, words):
    options = {**QUICK, "steps": 20, **change}
    new, old = texts(options.pop("n", 100), new_dim=options.pop("new_dim", 24))
    if "nan" in options:
        new[options.pop("nan"), 0] = float("nan")
    if options.pop("short", False):
        new = new[1:]
    if "pairs" in options:
        options["pairs"] = world_of_pairs(options["pairs"])
    with pytest.raises(error, match=words):
        fit_xbt(new, old, **options)


def test_streams_are_refused():
    new, old = texts(50)
    with pytest.raises(ConfigError, match="stream"):
        fit_xbt(iter([new]), iter([old]))


def test_without_steps_the_mlp_is_the_procrustes_rotation():
    for rows in (texts(), texts(1), texts(7)):
        projection = fit_mlp(*rows, steps=0)
        assert isinstance(projection, ResidualProjection)
        assert projection.hidden_dim == 256
        torch.testing.assert_close(projection(rows[0]), fit_procrustes(*rows)(rows[0]))


def test_training_the_mlp_improves_what_was_never_seen():
    new, old = texts(1500)
    start = fit_mlp(new[:1200], old[:1200], steps=0)
    trained = fit_mlp(new[:1200], old[:1200], steps=150, **MLP_QUICK)
    before, after = (text_hits(each, new[1200:], old[1200:]).mean() for each in (start, trained))
    assert after > before + 0.05
    assert not torch.equal(trained.weight, start.weight)
    first, _, second = trained.mlp
    correction = gelu(new @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = new @ trained.weight.T + correction
    torch.testing.assert_close(trained(new), normalize(expected, dim=1))
    wrecked = fit_mlp(new, old, steps=20, **{**MLP_QUICK, "lr": 30.0})
    torch.testing.assert_close(wrecked(new), fit_procrustes(new, old)(new))


def test_seed_fixes_every_byte_of_the_mlp_and_it_is_saved(tmp_path):
    new, old = texts(300)
    before = torch.get_rng_state()
    first, second, other = (fit_mlp(new, old, steps=25, seed=seed, **MLP_QUICK) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.mlp[0].weight, other.mlp[0].weight)
    first.save_pretrained(tmp_path)
    assert torch.equal(Projection.from_pretrained(tmp_path)(new), first(new))
