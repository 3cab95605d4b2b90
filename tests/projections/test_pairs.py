"""Pairs as vectors: directions, positives, subsets and folds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xbt.errors import DataError, SpaceMismatchError
from xbt.projections import PairVectors
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([2, 0, 0, 1, 2, 3])
    return PairVectors(
        new_texts=torch.randn(6, 5, generator=generator),
        old_texts=torch.randn(6, 3, generator=generator),
        old_images=torch.randn(4, 3, generator=generator),
        image_of_text=owner,
        new_images=3 * torch.randn(4, 5, generator=generator),
    )


def test_rows_are_unit_and_answers_are_right(pairs):
    assert len(pairs) == 4
    assert pairs.dims == (5, 3)
    torch.testing.assert_close(pairs.new_images.norm(dim=1), torch.ones(4))
    assert pairs.positives("T2I") == [[2], [0], [0], [1], [2], [3]]
    assert pairs.positives("I2T") == [[1, 2], [3], [0, 4], [5]]
    assert torch.equal(pairs.groups("T2I"), pairs.image_of_text)
    assert torch.equal(pairs.groups("I2T"), torch.arange(4))
    new, old = pairs.queries("I2T")
    assert torch.equal(new, pairs.new_images)
    assert torch.equal(old, pairs.old_images)
    assert torch.equal(pairs.gallery("I2T"), pairs.old_texts)
    assert torch.equal(pairs.gallery("T2I"), pairs.old_images)


def test_a_subset_keeps_every_text_of_its_images(pairs):
    part = pairs.subset([3, 0])
    assert torch.equal(part.old_images, pairs.old_images[[3, 0]])
    assert torch.equal(part.old_texts, pairs.old_texts[[1, 2, 5]])
    assert part.image_of_text.tolist() == [1, 1, 0]
    assert torch.equal(part.new_images, pairs.new_images[[3, 0]])


def test_folds_share_nothing_and_cover_everything(pairs):
    held = []
    for seen, part in pairs.folds(2, seed=1):
        assert len(seen) + len(part) == 4
        rows = {tuple(row) for row in seen.old_images.tolist()}
        own = {tuple(row) for row in part.old_images.tolist()}
        assert not rows & own
        held += sorted(own)
    assert sorted(held) == sorted(tuple(row) for row in pairs.old_images.tolist())


def test_without_new_images_there_is_only_t2i(pairs):
    texts = replace(pairs, new_images=None)
    assert texts.directions == ("T2I",)
    assert texts.subset([1]).new_images is None
    with pytest.raises(DataError, match="no new image vectors"):
        texts.queries("I2T")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_of_text": torch.tensor([0, 1, 2, 3, 0])}, "6 new text vectors where 5 are needed"),
        ({"image_of_text": torch.tensor([0, 0, 0, 1, 2, 4])}, "outside 0 to 3"),
        ({"image_of_text": torch.tensor([0, 0, 0, 1, -1, 3])}, "outside 0 to 3"),
        ({"image_of_text": torch.tensor([0, 0, 0, 1, 1, 3])}, "image 2 of the pairs has no text"),
        ({"new_images": torch.ones(3, 5)}, "3 new image vectors where 4 are needed"),
        ({"old_images": torch.zeros(4, 3)}, "old image vectors of the pairs has zero rows, first row 0"),
        ({"old_texts": torch.full((6, 3), float("nan"))}, "old text vectors of the pairs has NaN"),
        ({"old_texts": torch.ones(0, 3)}, "is empty"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs, change, message):
    with pytest.raises(DataError, match=message):
        replace(pairs, **change)


def test_other_dimensions_are_refused(pairs):
    with pytest.raises(SpaceMismatchError, match="old image vectors of the pairs has dimension 4"):
        replace(pairs, old_images=torch.ones(4, 4))
    with pytest.raises(SpaceMismatchError, match="new image vectors"):
        replace(pairs, new_images=torch.ones(4, 3))


def test_vectors_may_come_from_stores(pairs, tmp_path):
    def store(name, rows, space):
        made = EmbeddingStore.create(tmp_path / name, modality="text", space=space, dtype="float32")
        made.append(rows.numpy(), [str(row) for row in range(len(rows))])
        return made

    probe = torch.nn.functional.normalize(torch.randn(20, 3), dim=1)
    old = EmbeddingSpace("old", 3, probe=probe)
    texts, images = store("texts", pairs.old_texts, old), store("images", pairs.old_images, old)
    found = replace(pairs, old_texts=texts, old_images=images)
    assert torch.equal(found.old_texts, pairs.old_texts)
    assert torch.equal(found.old_images, pairs.old_images)
    other = store("other", pairs.old_images, EmbeddingSpace("other", 3, probe=probe.flip(0)))
    with pytest.raises(SpaceMismatchError, match="old image vectors of the pairs"):
        replace(pairs, old_texts=texts, old_images=other)


@pytest.mark.parametrize("count", [1, 5])
def test_too_many_or_too_few_folds(pairs, count):
    with pytest.raises(DataError, match="cannot be split"):
        pairs.folds(count)


def test_an_unknown_direction_is_named(pairs):
    for ask in (pairs.positives, pairs.queries, pairs.gallery):
        with pytest.raises(DataError, match="no direction 'T2T'"):
            ask("T2T")
    with pytest.raises(DataError, match="at least one image"):
        pairs.subset([])
