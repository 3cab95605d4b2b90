"""Embedding a list once, split over the processes, and keeping the vectors with the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from xbt.encoders import DualEncoder
from xbt.run_dir import write_json

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
    accelerator: Accelerator, encoder: DualEncoder, texts: list[str], cache: Path, batch_size: int
) -> Tensor:
    """Embeds texts, or reads the vectors that an earlier, killed run of the same job left in its directory.

    Args:
        accelerator: The run's Accelerate object.
        encoder: The text tower to use.
        texts: n texts.
        cache: Where the vectors are kept, without suffix.
        batch_size: Texts per forward pass.

    Returns:
        (n, dim) float32 CPU unit rows.
    """
    values, record = cache.with_suffix(".npy"), cache.with_suffix(".json")
    key = _cache_key(encoder, texts)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == key:
        return torch.from_numpy(np.load(values, allow_pickle=False))
    show = accelerator.is_main_process
    vectors = embed_split(
        accelerator, texts, lambda part: encoder.encode_texts(part, batch_size, progress=show)
    )
    if accelerator.is_main_process:
        values.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        np.save(values, vectors.numpy(), allow_pickle=False)
        write_json(record, key)  # last: it vouches for the vectors
    accelerator.wait_for_everyone()
    return vectors


def _cache_key(encoder: DualEncoder, texts: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8"))
        digest.update(b"\0")
    probe = encoder.space.to_dict()["probe"]
    return {"texts": digest.hexdigest(), "count": len(texts), "space": encoder.name, "probe": probe}
