"""Embedding a list once, split over the processes, and keeping the vectors with the run."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from xbt.embedding import embed_texts_into_store
from xbt.encoders import DualEncoder
from xbt.errors import TruncationWarning
from xbt.probe import PROBE_TEXTS
from xbt.run_dir import write_json
from xbt.store import EmbeddingStore

Item = TypeVar("Item")


def embed_split(
    accelerator: Accelerator, items: Sequence[Item], embed: Callable[[Sequence[Item]], Tensor]
) -> Tensor:
    """Embeds every item in one of the processes and gives all of them the whole result.

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
    """Embeds texts into a store in the run's directory, or goes on where an earlier, killed run stopped.

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
    record, key = path.with_suffix(".json"), _cache_key(encoder, texts)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != key:
            # In this order, so that a kill in between leaves no vectors that the record does not fit.
            shutil.rmtree(path, ignore_errors=True)
            write_json(record, key)
    accelerator.wait_for_everyone()
    ids = [str(row) for row in range(len(texts))]
    return embed_texts_into_store(encoder, texts, ids, path, batch_size=batch_size, dtype="float32")


def _cache_key(encoder: DualEncoder, texts: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8"))
        digest.update(b"\0")
    # Not the space's: behind a projection that is the old model's, whatever the projection.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # cut texts tell models apart as well
        probe = encoder.encode_texts(PROBE_TEXTS).half().numpy().astype("<f2")
    fingerprint = hashlib.sha256(probe.tobytes()).hexdigest()
    return {"texts": digest.hexdigest(), "count": len(texts), "encoder": encoder.name, "probe": fingerprint}
