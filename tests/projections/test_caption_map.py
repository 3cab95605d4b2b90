"""Caption forward map: the formula written out in numpy, blocks, owners, files."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections import Projection, fit_forward, fit_procrustes
from xbt.projections.caption_map import CaptionForwardMap, Neighbours, fit_caption_map
from xbt.projections.hubness import highest, nearest
from xbt.space import EmbeddingSpace


def rows(n, dim, seed):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def unit(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def written_out(gallery, old, new, k, temperature, rotation=None):
    """f(g) in numpy, row by row."""
    found = []
    for g in gallery.double().numpy():
        cosines = old.double().numpy() @ g
        near = np.argsort(-cosines)[:k]
        weights = np.exp(cosines[near] / temperature)
        weights /= weights.sum()
        vector = weights @ new.double().numpy()[near]
        if rotation is not None:
            vector += g @ rotation.T - weights @ (old.double().numpy()[near] @ rotation.T)
        found.append(vector)
    return unit(np.array(found))


@pytest.mark.parametrize("residual", [False, True])
def test_it_is_the_documented_formula(residual):
    old, new, gallery = rows(90, 8, 0), rows(90, 10, 1), rows(30, 8, 2)
    rule = Neighbours(7, 0.1, residual)
    made = fit_caption_map(3 * old, new.numpy(), rules={"text": rule})
    rotation = fit_forward(old, new).weight.detach().double().numpy() if residual else None
    expected = written_out(gallery, old, new, 7, 0.1, rotation)
    np.testing.assert_allclose(made(2 * gallery).numpy(), expected, atol=1e-5)
    images = written_out(gallery, old, new, 50, 0.05)
    np.testing.assert_allclose(made(gallery, "image").numpy(), images, atol=1e-5)


def test_the_residual_form_is_exact_where_the_models_differ_by_a_rotation():
    turn = torch.linalg.qr(rows(8, 8, 3)).Q
    old, gallery = rows(40, 8, 4), rows(12, 8, 5)
    made = fit_caption_map(old, old @ turn, rules={"text": Neighbours(5, 0.05, residual=True)})
    torch.testing.assert_close(made(gallery), gallery @ turn, atol=1e-5, rtol=0)


def test_it_learns_what_no_rotation_can():
    """New vectors that are a curved function of the old ones, at points that are not among the anchors."""
    mixing = rows(4, 12, 6)

    def new_of(old):
        return normalize(old @ mixing + 2 * (old @ mixing).square(), dim=1)

    old, gallery = rows(4000, 4, 7), rows(200, 4, 8)
    errors = {
        residual: float(
            (
                fit_caption_map(old, new_of(old), rules={"text": Neighbours(20, 0.01, residual)})(gallery)
                - new_of(gallery)
            )
            .norm(dim=1)
            .mean()
        )
        for residual in (False, True)
    }
    turned = fit_forward(old, new_of(old))(gallery).detach()
    rotated = float((turned - new_of(gallery)).norm(dim=1).mean())
    assert max(errors.values()) < rotated / 3


def test_blocks_change_nothing(monkeypatch):
    old, gallery = rows(700, 6, 9), rows(50, 6, 10)
    cosines = (gallery @ old.T).topk(4, dim=1)
    module = import_module("xbt.projections.hubness")
    monkeypatch.setattr(module, "_SCORE_BYTES", 4 * 100 * 7)
    monkeypatch.setattr(module, "_BLOCK", 100)
    values, positions = nearest(gallery, old, 4)
    assert torch.equal(positions, cosines.indices)
    torch.testing.assert_close(values, cosines.values)


@pytest.mark.parametrize(("columns", "k"), [(5000, 10), (5003, 3), (70, 1), (64, 10), (5, 10), (40_000, 50)])
def test_the_highest_of_long_rows(columns, k):
    scores = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    values, positions = highest(scores, k)
    expected = scores.topk(min(k, columns), dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(scores.gather(1, positions), values)


def test_a_row_does_not_see_its_own_anchors():
    """With the anchor that is the answer itself the estimate is perfect; without, it cannot be."""
    old, new = rows(60, 8, 11), rows(60, 10, 12)
    rule = {"text": Neighbours(1, 0.05)}
    made = fit_caption_map(old, new, rules=rule, owners=torch.arange(60))
    torch.testing.assert_close(made(old), new)
    others = made(old, own=torch.arange(60))
    for row in range(60):
        rest = [other for other in range(60) if other != row]
        expected = fit_caption_map(old[rest], new[rest], rules=rule)(old[row : row + 1])
        torch.testing.assert_close(others[row : row + 1], expected)
    torch.testing.assert_close(made(old, own=torch.full((60, 2), -1)), new)
    none = fit_caption_map(old[:1], new[:1], owners=torch.zeros(1, dtype=torch.int64))
    assert torch.equal(none(old[:1], own=torch.zeros(1, dtype=torch.int64)), torch.zeros(1, 10))


def test_rows_are_rewritten_in_the_old_dimension():
    old, new, gallery = rows(80, 8, 13), rows(80, 10, 14), rows(9, 8, 15)
    made, projection = fit_caption_map(old, new), fit_procrustes(new, old)
    expected = normalize(0.7 * gallery + 0.3 * projection(made(gallery)), dim=1)
    torch.testing.assert_close(made.rewritten(5 * gallery, projection, 0.3), expected.detach())
    with pytest.raises(SpaceMismatchError, match="the way back from this map is 10 → 8"):
        made.rewritten(gallery, fit_procrustes(old, old), 0.3)
    with pytest.raises(ConfigError, match=r"share of the forward scores is 1\.5"):
        made.rewritten(gallery, projection, 1.5)


def test_saved_and_loaded(tmp_path):
    rules = {"text": Neighbours(7, 0.1, True), "image": Neighbours(3)}
    made = fit_caption_map(rows(40, 8, 16), rows(40, 10, 17), rules=rules, owners=torch.arange(40))
    made.set_spaces(EmbeddingSpace("old-model", 8), EmbeddingSpace("new-model", 10))
    made.save_pretrained(tmp_path / "map")
    loaded = Projection.from_pretrained(tmp_path / "map")
    assert isinstance(loaded, CaptionForwardMap)
    assert loaded.rules == made.rules
    gallery = rows(20, 8, 18)
    for own in (None, torch.arange(20)):
        for modality in ("text", "image"):
            assert torch.equal(loaded(gallery, modality, own), made(gallery, modality, own))


def test_what_is_refused():
    old, new = rows(30, 8, 19), rows(30, 10, 20)
    with pytest.raises(DataError, match="29 rows of new vectors for 30 old vectors"):
        fit_caption_map(old, new[1:])
    for changes in ({"k": 0}, {"k": 1.5}, {"temperature": 0.0}, {"temperature": float("inf")}):
        with pytest.raises(ConfigError, match="the caption forward map was given"):
            replace(Neighbours(), **changes)
    with pytest.raises(ConfigError, match="needs at least one anchor"):
        CaptionForwardMap(8, 10, 0)
    with pytest.raises(ConfigError, match="rules are for 'image' and 'text'"):
        CaptionForwardMap(8, 10, 3, {"audio": Neighbours()})
    with pytest.raises(SpaceMismatchError, match="takes vectors of dimension 8"):
        fit_caption_map(old, new)(new)
