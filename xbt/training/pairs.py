"""What the recipes that train on image–text pairs share: vectors of held-out pairs, and recall on them."""

from __future__ import annotations

from typing import NamedTuple

from accelerate import Accelerator
from torch import Tensor

from xbt.data import ImageTextPairs
from xbt.encoders import DualEncoder
from xbt.errors import DataError
from xbt.evaluation import recall_at_k
from xbt.training.embedding import embed_split


class PairVectors(NamedTuple):
    """Vectors of pairs: (n_images, dim) and (n_texts, dim) float32 unit rows."""

    images: Tensor
    texts: Tensor


def require_enough(pairs: ImageTextPairs, batch_size: int) -> None:
    """Refuses a batch size that the pairs cannot fill.

    Raises:
        DataError: If there are fewer pairs than the batch size.
    """
    if len(pairs) < batch_size:
        raise DataError(
            f"there are {len(pairs)} training pairs, fewer than --training.batch_size {batch_size}; "
            "lower it or bring more pairs"
        )


def embed_pairs(accelerator: Accelerator, encoder: DualEncoder, pairs: ImageTextPairs) -> PairVectors:
    """Embeds all images and texts of some pairs, split over the processes."""
    rows = list(range(len(pairs)))
    images = embed_split(accelerator, rows, lambda part: encoder.encode_images(pairs.select(part).images))
    return PairVectors(images, embed_split(accelerator, pairs.texts, encoder.encode_texts))


def cross_recall(queries: PairVectors, gallery: PairVectors, pairs: ImageTextPairs) -> dict[str, float]:
    """R@1 of T2I and I2T with queries of one encoder and a gallery of another; their mean decides."""
    t2i = recall_at_k(queries.texts, gallery.images, pairs.positives_t2i, (1,))[1]
    i2t = recall_at_k(queries.images, gallery.texts, pairs.positives_i2t, (1,))[1]
    return {"score": (t2i + i2t) / 2, "t2i_r1": t2i, "i2t_r1": i2t}
