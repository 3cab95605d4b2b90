"""The plan of a backfill: models, pairs to learn from, the order of the items, and its rest in chunks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.backfill.config import BackfillConfig
from xbt.backfill.curve import Questions
from xbt.backfill.orders import (
    distance_to_mean_order,
    fastfill_order,
    oldest_first,
    query_log_order,
    random_order,
)
from xbt.backfill.rehearsal import fit_rehearsed_order
from xbt.compatible.encoder import CompatibleEncoder
from xbt.compatible.saving import ENSEMBLE_DIR
from xbt.data import ImageTextPairs, PairSource, load_pairs, load_readable_pairs, read_captions
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import DataError, StoreError
from xbt.files import write_record
from xbt.hub import fetch
from xbt.index.calibration import fit_merge
from xbt.index.mixed import Merge
from xbt.index.protocol import VectorIndex
from xbt.index.target import read_vectors
from xbt.store.layout import read_record

KINDS = ("affine", "isotonic", "rank", "raw")
"""Kinds of merge; of equally good ones the first is taken."""

T = TypeVar("T")
Queries = tuple[Tensor, Tensor]
"""The same queries in the old space and in the new one."""


@dataclass(frozen=True)
class Models:
    """The encoders of a backfill. The query encoder, if there is one, makes queries in the old space."""

    new: DualEncoder
    old: DualEncoder | None
    query_encoder: DualEncoder | None

    def queries(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts as (n, old_dim) and (n, new_dim) queries."""
        assert self.query_encoder is not None  # the config has checked it
        listed = list(texts)
        return self.query_encoder.encode_texts(listed), self.new.encode_texts(listed)


def load_models(config: BackfillConfig, new: DualEncoder) -> Models:
    """Load the models that a config names beside the new encoder."""
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
    """Pairs under both models, to learn from: (n, dim) images, and (q, dim) captions as queries.

    ``item_of_query`` (q,) int64 names the image of each caption.
    """

    old_items: Tensor
    new_items: Tensor
    old_queries: Tensor
    new_queries: Tensor
    item_of_query: Tensor

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[list[int]]]:
        """Old and new queries, old and new items, and the items that answer each query."""
        answers = [[item] for item in self.item_of_query.tolist()]
        return self.old_queries, self.new_queries, self.old_items, self.new_items, answers


def embed_support(
    config: BackfillConfig, models: Models, index: VectorIndex, old: str, ids: Collection[str]
) -> Support:
    """Embed pairs with both models; without the old one, their old vectors are read from the index.

    ``old`` names the old vector of the index, and ``ids`` are all of its ids.
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
    """Load the pairs that measure recall, if any: those whose images are among the ids."""
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


@dataclass(frozen=True)
class Chunk:
    """Ids that are written at once, most urgent first, and the position in the order after them."""

    ids: list[str]
    end: int


def kept_plan(path: Path, pending: Sequence[str]) -> list[str] | None:
    """Read the order of an earlier run, if there is one, and append the items added since."""
    kept = read_order(path)
    if kept is None:
        return None
    seen = set(kept[0])
    added = [name for name in pending if name not in seen]
    if added:
        write_order(path, kept[0] + added, kept[1])
    return kept[0] + added


def draw_plan(
    path: Path,
    config: BackfillConfig,
    index: VectorIndex,
    old: str,
    pending: Sequence[str],
    models: Models,
    support: Support | None,
    merge: Merge,
) -> list[str]:
    """Order the pending items of an index by the rule of the config, and write the order to disk.

    ``old`` names the old vector. The config has checked that everything that its rule needs is there.
    """
    log = None if config.query_log is None else models.queries(read_captions(config.query_log))
    ids = list(pending)
    if len(ids) > 1:
        items = read_vectors(index, ids, old)
        rules: dict[str, Callable[[], Tensor]] = {
            "random": lambda: random_order(len(items), config.seed),
            "oldest": lambda: oldest_first(np.arange(len(items), dtype=np.float64)),
            "query_log": lambda: query_log_order(_given(log)[0], items),
            "distance_to_mean": lambda: distance_to_mean_order(
                items, clusters=config.clusters, seed=config.seed
            ),
            "fastfill": lambda: _fastfill(items, _given(support), config.seed),
            "rehearsed": lambda: _rehearsed(items, _given(support), log, merge, config.seed),
        }
        ids = [ids[row] for row in rules[config.order]().tolist()]
    write_order(path, ids, {"order": config.order, "seed": config.seed})
    return ids


def cut(order: Sequence[str], pending: Collection[str], config: BackfillConfig) -> tuple[int, list[Chunk]]:
    """Cut the rest of an order into chunks, whose ends do not depend on where an earlier run stopped.

    Returns:
        The position before which nothing is pending, and the chunks after it.
    """
    done = next((place for place, name in enumerate(order) if name in pending), len(order))
    position, limit = done, min(len(order), config.max_items or len(order))
    chunks = []
    while done < limit:
        steps = config.commit_every, config.evaluate_every
        end = min(limit, *((done // step + 1) * step for step in steps))
        chunks.append(Chunk([name for name in order[done:end] if name in pending], end))
        done = end
    return position, chunks


def fit_support_merge(support: Support, seed: int, kinds: Sequence[str] = KINDS) -> Merge:
    """Fit a merge to the support, of the kind with the best recall among these."""
    return fit_merge(*support.sides, kinds=kinds, groups=support.item_of_query, seed=seed)


def _given(value: T | None) -> T:
    assert value is not None  # the config has checked it
    return value


def _fastfill(items: NDArray[np.float32], support: Support, seed: int) -> Tensor:
    sample = support.old_items, support.new_items, support.new_queries, support.item_of_query
    return fastfill_order(items, *sample, seed=seed)


def _rehearsed(
    items: NDArray[np.float32], support: Support, log: Queries | None, merge: Merge, seed: int
) -> Tensor:
    if merge.by_rank:  # a rehearsal compares scores
        merge = fit_support_merge(support, seed, ("affine",))
    old, new = log or (support.old_queries, support.new_queries)
    learned = fit_rehearsed_order(*support.sides, merge, sample_old=old, sample_new=new, seed=seed)
    return learned.order(items)


def read_order(path: Path) -> tuple[list[str], dict[str, Any]] | None:
    """Read the order of an earlier run, and how it was made; ``None`` if there is none."""
    if not path.is_file():
        return None
    record = read_record(path)
    ids = record.pop("ids", None)
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise StoreError(f"{path} holds no order; restore the file, or pass --overwrite true")
    return ids, record


def write_order(path: Path, ids: Sequence[str], about: dict[str, Any]) -> None:
    """Write an order whole: its ids, most urgent first, and how it was made."""
    write_record(path, {**about, "ids": list(ids)})
