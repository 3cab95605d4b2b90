"""The models of a backfill, its queries, and the pairs it learns from, as vectors of both models."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xbt.backfill.config import BackfillConfig
from xbt.backfill.measure import Questions
from xbt.compatible import CompatibleEncoder
from xbt.compatible.saving import ENSEMBLE_DIR
from xbt.data import ImageTextPairs, PairSource, load_pairs, load_readable_pairs
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import DataError
from xbt.hub import fetch
from xbt.index.protocol import VectorIndex
from xbt.index.target import read_vectors


@dataclass(frozen=True)
class Models:
    """The models of a backfill.

    Attributes:
        new: The new encoder.
        old: The old encoder, if it was given.
        query_encoder: Makes queries in the old space; ``None`` if nothing was given for that.
    """

    new: DualEncoder
    old: DualEncoder | None
    query_encoder: DualEncoder | None

    def queries(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts as (n, old_dim) and (n, new_dim) queries."""
        assert self.query_encoder is not None  # the config has checked it
        listed = list(texts)
        return self.query_encoder.encode_texts(listed), self.new.encode_texts(listed)


def load_models(config: BackfillConfig, new: DualEncoder) -> Models:
    """Load the models that a config names beside the new encoder.

    Raises:
        XbtError: If a model cannot be loaded.
    """
    old = None if config.old is None else load_encoder(config.old, new.device)
    if config.compatible is None:
        return Models(new, old, old)
    directory = fetch(config.compatible)
    given = old if (directory / ENSEMBLE_DIR).is_dir() else None
    compatible = CompatibleEncoder.from_pretrained(
        directory, base=config.encoder, old=given, device=new.device
    )
    return Models(new, old, compatible)


@dataclass(frozen=True)
class Support:
    """Pairs under both models, to learn from.

    Attributes:
        old_items: (n, old_dim) images under the old model.
        new_items: (n, new_dim) the same under the new model.
        old_queries: (q, old_dim) their captions as queries in the old space.
        new_queries: (q, new_dim) the same under the new model.
        item_of_query: (q,) int64 the image of each caption.
    """

    old_items: Tensor
    new_items: Tensor
    old_queries: Tensor
    new_queries: Tensor
    item_of_query: Tensor

    @property
    def positives(self) -> list[list[int]]:
        """Items that answer each query."""
        return [[item] for item in self.item_of_query.tolist()]


def embed_support(
    config: BackfillConfig, models: Models, index: VectorIndex, old: str, ids: Collection[str]
) -> Support:
    """Embed pairs with both models; without the old one, their old vectors are read from the index.

    Args:
        config: With the pairs.
        models: The models.
        index: The index.
        old: Name of its old vector.
        ids: All ids of the index.

    Raises:
        DataError: If the pairs cannot be used, or there is no old model and an image is not in the index.
    """
    assert config.support is not None
    pairs, _ = load_readable_pairs(config.support)
    images = [pairs.image(row) for row in range(len(pairs))]
    if models.old is not None:
        old_items = models.old.encode_images(images, config.batch_size)
    else:
        unknown = next((name for name in pairs.ids if name not in ids), None)
        if unknown is not None:
            raise DataError(
                f"the image {unknown!r} of --support is not in the gallery, so its old vector is not known; "
                "give --old, or pairs of the gallery"
            )
        old_items = torch.from_numpy(read_vectors(index, pairs.ids, old))
    new_items = models.new.encode_images(images, config.batch_size)
    return Support(old_items, new_items, *models.queries(pairs.texts), torch.tensor(pairs.text_image))


def load_questions(config: BackfillConfig, ids: Collection[str]) -> ImageTextPairs | None:
    """Load the pairs that measure recall: those whose images are in the index; ``None`` if none are wanted.

    Args:
        config: With the pairs.
        ids: All ids of the index.

    Raises:
        DataError: If the pairs cannot be used, none is in the index, or one is in the support as well.
    """
    if config.evaluation is None:
        return None
    pairs = load_pairs(config.evaluation)
    there = [row for row, name in enumerate(pairs.ids) if name in ids]
    if not there:
        raise DataError(
            f"none of the {len(pairs)} images of --evaluation, first {pairs.ids[0]!r}, is in the gallery "
            f"{config.gallery}; give pairs of the gallery's images, under the gallery's ids"
        )
    if config.support is not None and _collection(config.support) == _collection(config.evaluation):
        shared = set(load_pairs(config.support).ids) & {pairs.ids[row] for row in there}
        if shared:
            raise DataError(
                f"{len(shared)} images are both in --support and in --evaluation, first {min(shared)!r}; "
                "measure on pairs that nothing is learned from"
            )
    if len(there) < len(pairs):
        print(
            f"recall is measured with the captions of {len(there)} of {len(pairs)} images: the others are "
            "not in the gallery"
        )
    return pairs.select(there)


def as_questions(pairs: ImageTextPairs, models: Models) -> Questions:
    """Embed the captions of pairs with both models."""
    assert models.query_encoder is not None
    answers = [pairs.ids[row] for row in pairs.text_image]
    groups = torch.tensor(pairs.text_image)
    queries = models.queries(pairs.texts)
    return Questions(*queries, answers, groups, models.query_encoder.space, models.new.space)


def _collection(source: PairSource) -> tuple[str, str | None, str | None]:
    """Within one collection an id names one image; in another collection it may name another image."""
    return source.source, source.split, source.subset
