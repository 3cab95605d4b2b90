"""What frozen models make of the training images: embedded once, kept with the run, read ever after."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from xbt.backbones import CompatibleBackbone
from xbt.data import LabelledImages
from xbt.run_dir import write_json
from xbt.store import EmbeddingStore, StoreBuilder
from xbt.training.labelled_batches import ids_digest

SHARD_ROWS = 4096
"""Images per shard: what a killed run has to embed again at most, per process."""


def embed_images_once(
    accelerator: Accelerator,
    backbone: CompatibleBackbone,
    images: LabelledImages,
    path: Path,
    batch_size: int = 64,
    num_workers: int = 0,
) -> EmbeddingStore:
    """Embeds images into a store in the run's directory, or goes on where an earlier, killed run stopped.

    The images are preprocessed as for evaluation, so that a vector belongs to an image and not to one of its
    augmentations. Shards are split over the processes.

    Args:
        accelerator: The run's Accelerate object.
        backbone: The frozen model; its whole vectors are stored.
        images: n images, all readable.
        path: The store's directory; beside it, a record says which images and which model it belongs to,
            and vectors of others are replaced.
        batch_size: Images per forward pass.
        num_workers: Processes that decode, per process of the run.

    Returns:
        The store of n float32 unit rows, with the images' ids.

    Raises:
        ImageError: If an image cannot be read.
        DataError: If the model gives NaN.
    """
    builder = StoreBuilder(path, modality="image", space=backbone.space, dtype="float32")
    if accelerator.is_main_process:
        _forget_others(path, _cache_key(backbone, images))
        builder.prepare()
    accelerator.wait_for_everyone()
    starts = range(0, len(images), SHARD_ROWS)
    names = {f"{number:06d}": start for number, start in enumerate(starts)}
    left = [name for name in names if name not in builder.committed()]
    accelerator.wait_for_everyone()  # all must see the same list before one of them shortens it
    for name in left[accelerator.process_index :: accelerator.num_processes]:
        part = images.select(range(names[name], min(names[name] + SHARD_ROWS, len(images))))
        show = accelerator.is_main_process
        vectors = backbone.encode_images(
            part.images, batch_size=batch_size, progress=show, num_workers=num_workers
        )
        builder.write(name, vectors, part.ids)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        builder.finish(names)
    accelerator.wait_for_everyone()
    return EmbeddingStore.open(path)


def _forget_others(path: Path, key: dict[str, Any]) -> None:
    """Removes the vectors of other images or of another model."""
    record = path.with_suffix(".json")
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != key:
        # In this order, so that a kill in between leaves no vectors that the record does not fit.
        shutil.rmtree(path, ignore_errors=True)
        write_json(record, key)


def _cache_key(backbone: CompatibleBackbone, images: LabelledImages) -> dict[str, Any]:
    space = json.dumps(backbone.space.to_dict(), sort_keys=True)
    return {
        "images": ids_digest(images.ids),
        "count": len(images),
        "model": hashlib.sha256(space.encode("utf-8")).hexdigest(),
    }
