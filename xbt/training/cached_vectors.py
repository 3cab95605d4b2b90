"""Vectors that a run embeds once, split over the processes, and caches in its directory.

They include vectors of held-out pairs, with their recall, and the same texts under two models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from xbt.data import ImageTextPairs, PairSource, load_readable_pairs
from xbt.embedding import embed_texts_into_store
from xbt.encoders import DualEncoder
from xbt.errors import ConfigError, DataError, StoreError, TruncationWarning
from xbt.evaluation import recall_at_k
from xbt.projections.sources import PairedRows
from xbt.run_dir import RunDirectory, write_json
from xbt.space import PROBE_TEXTS, EmbeddingSpace
from xbt.store.store import EmbeddingStore
from xbt.training.args import TrainArgs
from xbt.training.loop import make_accelerator

Item = TypeVar("Item")


def embed_split(
    accelerator: Accelerator, items: Sequence[Item], embed: Callable[[Sequence[Item]], Tensor]
) -> Tensor:
    """Embed items, split over the processes, and return all vectors in every process.

    Args:
        accelerator: The run's Accelerate object.
        items: What to embed; the same in every process.
        embed: Maps some of the items, in order, to (n, dim) CPU vectors.

    Returns:
        (len(items), dim) CPU vectors in the order of the items.
    """
    share = -(-len(items) // accelerator.num_processes)
    first = min(share * accelerator.process_index, len(items))
    mine = embed(items[first : first + share])
    if accelerator.num_processes == 1:
        return mine
    return torch.cat(gather_object([mine]))


def embed_texts_once(
    accelerator: Accelerator, encoder: DualEncoder, texts: list[str], path: Path, batch_size: int = 256
) -> EmbeddingStore:
    """Embed texts into a store in the run's directory; continues an earlier, killed run.

    Args:
        accelerator: The run's Accelerate object.
        encoder: The text tower to use.
        texts: n texts.
        path: The store's directory; beside it, a record says which texts and which tower it belongs to, and
            vectors of others are replaced.
        batch_size: Texts per forward pass.

    Returns:
        The store of n float32 unit rows, with the texts' numbers as ids.
    """
    if accelerator.is_main_process:
        remove_other_vectors(path, _cache_key(encoder, texts))
    accelerator.wait_for_everyone()
    ids = [str(row) for row in range(len(texts))]
    return embed_texts_into_store(encoder, texts, ids, path, batch_size=batch_size, dtype="float32")


def remove_other_vectors(path: Path, key: dict[str, Any]) -> None:
    """Remove a store of other items or of another model than the record beside it is to name."""
    record = path.with_suffix(".json")
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != key:
        # In this order a kill in between leaves no vectors beside a record of others.
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, key)


def _cache_key(encoder: DualEncoder, texts: list[str]) -> dict[str, Any]:
    # Not the space's: behind a projection that is the old model's, whatever the projection.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # cut texts tell models apart as well
        probe = encoder.encode_texts(PROBE_TEXTS).half().numpy().astype("<f2")
    fingerprint = hashlib.sha256(probe.tobytes()).hexdigest()
    return {"texts": list_digest(texts), "count": len(texts), "encoder": encoder.name, "probe": fingerprint}


def list_digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts or ids in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\0")
    return digest.hexdigest()


class EncodedPairs(NamedTuple):
    """Vectors of pairs under one encoder: (n_images, dim) and (n_texts, dim) float32 unit rows."""

    images: Tensor
    texts: Tensor


@dataclass(kw_only=True)
class PairTraining:
    """Settings of every training on image–text pairs."""

    pairs: PairSource
    """The image–text pairs."""
    output_dir: str
    """Output directory of the run."""
    training: TrainArgs = field(default_factory=TrainArgs)
    """Settings of the training."""
    held_out: float = 0.2
    """Fraction of the pairs held out to choose the best step."""
    overwrite: bool = False
    """Replace another run in the output directory."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held_out must lie between 0 and 1, got {self.held_out}")


def begin_on_pairs(
    config: PairTraining, name: str
) -> tuple[RunDirectory, Accelerator, ImageTextPairs, ImageTextPairs]:
    """Open the run, and read its pairs and split them into those to train on and those held out."""
    run = RunDirectory(config.output_dir, config, config.overwrite)
    accelerator = make_accelerator(config.training, run, config, name)
    pairs, _ = load_readable_pairs(config.pairs, progress=accelerator.is_main_process)
    train, held_out = pairs.split(config.held_out, config.training.seed)
    if len(train) < config.training.batch_size:
        raise DataError(
            f"there are {len(train)} training pairs, fewer than --training.batch_size "
            f"{config.training.batch_size}; lower it or bring more pairs"
        )
    return run, accelerator, train, held_out


def embed_pairs(accelerator: Accelerator, encoder: DualEncoder, pairs: ImageTextPairs) -> EncodedPairs:
    """Embed the images and texts of pairs, split over the processes."""
    rows = list(range(len(pairs)))
    images = embed_split(accelerator, rows, lambda part: encoder.encode_images(pairs.select(part).images))
    return EncodedPairs(images, embed_split(accelerator, pairs.texts, encoder.encode_texts))


def cross_recall(queries: EncodedPairs, gallery: EncodedPairs, pairs: ImageTextPairs) -> dict[str, float]:
    """R@1 of T2I and I2T with queries of one encoder and a gallery of another; their mean is the score."""
    t2i = recall_at_k(queries.texts, gallery.images, pairs.positives_t2i, (1,))[1]
    i2t = recall_at_k(queries.images, gallery.texts, pairs.positives_i2t, (1,))[1]
    return {"score": (t2i + i2t) / 2, "t2i_r1": t2i, "i2t_r1": i2t}


CAPTION = "caption"
_ROWS_AT_ONCE = 8_192


@dataclass(frozen=True)
class TextVectors(PairedRows):
    """The same texts under both models, (n, dim) float32 unit rows each, as tensors or stores.

    Attributes:
        new_space: The space of ``new``.
        old_space: The space of ``old``.
    """

    new_space: EmbeddingSpace | None = None
    old_space: EmbeddingSpace | None = None


def open_text_stores(new: str, old: str) -> TextVectors:
    """Open two stores of the same texts and pair them.

    Args:
        new: The directory of the new model's text store.
        old: The directory of the old model's text store.

    Returns:
        The vectors; of texts that occur several times, where the stores know their captions, the first row.
        (Captions are compared by 64-bit hashes.)
    """
    first, second = _open(new, "new_store"), _open(old, "old_store")
    return TextVectors(first, second, distinct_rows(first, second), first.space, second.space)


def _open(path: str, flag: str) -> EmbeddingStore:
    try:
        store = EmbeddingStore.open(path, "text")
    except StoreError as error:
        raise StoreError(f"--{flag}: {error}") from error
    if store.space is None:
        raise StoreError(
            f"--{flag}: {store.path} does not say which model made its vectors, and a projection must know; "
            "embed the texts with recipes/embed.py, whose stores say it"
        )
    return store


def distinct_rows(new: EmbeddingStore, old: EmbeddingStore) -> NDArray[np.int64] | None:
    """Rows of the first of equal captions, or ``None`` for all; checks that the stores have equal ids."""
    count = min(len(new), len(old))
    captioned = [store for store in (new, old) if CAPTION in store.columns]
    hashes = np.empty(count if captioned else 0, np.uint64)
    for start in range(0, count, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, count)
        ids = new.read_ids(start, stop)
        _require_same(new, old, "id", ids, old.read_ids(start, stop), start)
        if captioned:
            captions = [each.metadata([CAPTION], start, stop)[CAPTION].to_pylist() for each in captioned]
            _require_same(new, old, CAPTION, captions[0], captions[-1], start)
            texts = [name if text is None else text for name, text in zip(ids, captions[0], strict=True)]
            # Not Python's own hash, which differs between processes.
            digests = (hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() for text in texts)
            hashes[start:stop] = np.frombuffer(b"".join(digests), "<u8")
    if len(new) != len(old):
        raise DataError(
            f"--new_store {new.path} has {len(new)} rows and --old_store {old.path} has {len(old)}, but "
            "both must be of the same texts; embed the same captions with both models"
        )
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return None if len(first) == count or not captioned else first


def _require_same(
    new: EmbeddingStore, old: EmbeddingStore, what: str, ours: list[str], theirs: list[str], start: int
) -> None:
    if ours == theirs:
        return
    row = next(number for number, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    raise DataError(
        f"row {start + row} has the {what} {ours[row]!r} in --new_store {new.path} but {theirs[row]!r} in "
        f"--old_store {old.path}; embed the same captions with both models"
    )
