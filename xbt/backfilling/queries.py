"""What a backfill asks its gallery, and the pairs that it learns from, as vectors of both models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xbt.backfilling.config import BackfillConfig
from xbt.backfilling.curve import Questions
from xbt.compatible import CompatibleEncoder
from xbt.compatible.saving import ENSEMBLE_DIR
from xbt.data import ImageTextPairs, PairSource, load_pairs, load_readable_pairs
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import DataError
from xbt.gallery import Gallery
from xbt.hub import fetch


@dataclass(frozen=True)
class Models:
    """The models of a backfill.

    Attributes:
        new: The new encoder.
        old: The old one, where it was given.
        asking: What makes queries in the old space; ``None`` if nothing was given for that.
    """

    new: DualEncoder
    old: DualEncoder | None
    asking: DualEncoder | None

    def queries(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same texts as (n, old_dim) and (n, new_dim) queries."""
        assert self.asking is not None  # the config sees to it
        listed = list(texts)
        return self.asking.encode_texts(listed), self.new.encode_texts(listed)


def load_models(config: BackfillConfig, new: DualEncoder) -> Models:
    """Loads what a config names beside the new encoder.

    Raises:
        XbtError: If a model cannot be loaded.
    """
    old = None if config.old is None else load_encoder(config.old, new.device)
    if config.compatible is None:
        return Models(new, old, old)
    directory = fetch(config.compatible)
    given = old if (directory / ENSEMBLE_DIR).is_dir() else None
    asking = CompatibleEncoder.from_pretrained(directory, base=config.encoder, old=given, device=new.device)
    return Models(new, old, asking)


@dataclass(frozen=True)
class Support:
    """Pairs under both models, to learn from.

    Attributes:
        old_items: (n, old_dim) images under the old model.
        new_items: (n, new_dim) the same under the new one.
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
        """For every query the items that answer it."""
        return [[item] for item in self.item_of_query.tolist()]


def embed_support(source: PairSource, models: Models, gallery: Gallery, batch_size: int) -> Support:
    """Embeds pairs with both models; without the old one, their old vectors are looked up in the gallery.

    Raises:
        DataError: If the pairs cannot be used, or there is no old model and an image is not in the gallery.
    """
    pairs, _ = load_readable_pairs(source)
    images = [pairs.image(row) for row in range(len(pairs))]
    if models.old is not None:
        old = models.old.encode_images(images, batch_size)
    else:
        part = gallery.parts[0].name
        strange = next((name for name in pairs.ids if name not in gallery), None)
        if strange is not None:
            raise DataError(
                f"the image {strange!r} of --support is not in the gallery, so its old vector is not known; "
                "give --old, or pairs of the gallery"
            )
        old = torch.from_numpy(gallery.vectors(pairs.ids, part=part))
    new = models.new.encode_images(images, batch_size)
    return Support(old, new, *models.queries(pairs.texts), torch.tensor(pairs.text_image))


def load_questions(config: BackfillConfig, gallery: Gallery) -> ImageTextPairs | None:
    """The pairs that measure recall: those whose images are in the gallery; ``None`` if none are wanted.

    Raises:
        DataError: If the pairs cannot be used, none is in the gallery, or one is of the support as well.
    """
    if config.evaluation is None:
        return None
    pairs = load_pairs(config.evaluation)
    there = [row for row, name in enumerate(pairs.ids) if name in gallery]
    if not there:
        raise DataError(
            f"none of the {len(pairs)} images of --evaluation, first {pairs.ids[0]!r}, is in the gallery "
            f"{gallery.path}; give pairs of the gallery's images, under the gallery's ids"
        )
    if config.support is not None and _listed(config.support) == _listed(config.evaluation):
        shared = set(load_pairs(config.support).ids) & {pairs.ids[row] for row in there}
        if shared:
            raise DataError(
                f"{len(shared)} images are both in --support and in --evaluation, first {min(shared)!r}; "
                "measure on pairs that nothing is learnt from"
            )
    if len(there) < len(pairs):
        print(f"recall is measured with the captions of {len(there)} of {len(pairs)} images: the others are "
              "not in the gallery")  # fmt: skip
    return pairs.select(there)


def as_questions(pairs: ImageTextPairs, models: Models) -> Questions:
    """Embeds the captions of pairs with both models."""
    assert models.asking is not None
    answers = [pairs.ids[row] for row in pairs.text_image]
    groups = torch.tensor(pairs.text_image)
    return Questions(*models.queries(pairs.texts), answers, groups, models.asking.space, models.new.space)


def _listed(source: PairSource) -> tuple[str, str | None, str | None]:
    """Within these, an id names one image; elsewhere it may name another."""
    return source.source, source.split, source.subset
