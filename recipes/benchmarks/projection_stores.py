"""Stores as data of the projections' benchmark: vectors of images, of their texts and of a corpus."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from xbt.errors import DataError
from xbt.projections import PairVectors
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

IMAGE, CAPTION = "image_id", "caption"

Both = tuple[EmbeddingStore, EmbeddingStore]


def read_stores(folder: str) -> tuple[PairVectors, tuple[Tensor, Tensor] | None]:
    """Join the stores of a folder, as ``recipes/embed.py`` makes them, by their ids.

    The folder holds ``old_images``, ``old_texts`` and ``new_texts``; with ``new_images`` there are image
    queries too, and with ``old_corpus`` and ``new_corpus`` texts to fit to. The image of a text is its
    ``image_id`` in the metadata, or else its own id up to the last ``#``. Images without a text are left out,
    and so are texts of the corpus that are captions of the pairs, where the stores hold captions.

    Args:
        folder: Where the stores are.

    Returns:
        The pairs, and new and old vectors of the corpus, or ``None`` if there is none.

    Raises:
        StoreError: If a store is missing or cannot be read.
        SpaceMismatchError: If the stores of one model are of different spaces.
        DataError: If the two models' are not of the same items, or a text's image is not there.
    """
    root = Path(folder)
    old_images = EmbeddingStore.open(root / "old_images", "image")
    texts, with_new = _both(root, "texts", old_images.space), (root / "new_images").exists()
    owners = _owners(texts[1], old_images.ids)
    kept = torch.unique(owners)
    new_images = None
    if with_new:
        images = EmbeddingStore.open(root / "new_images", "image", texts[0].space), old_images
        new_images = _joined(images)[0][kept]
    new_texts, old_texts = _joined(texts)
    pairs = PairVectors(
        new_texts,
        old_texts,
        torch.from_numpy(old_images.read())[kept],
        torch.searchsorted(kept, owners),
        new_images,
    )
    if not any((root / f"{model}_corpus").exists() for model in ("new", "old")):
        return pairs, None
    corpus = _both(root, "corpus", old_images.space)
    rows = _others(corpus[1], texts[1])
    new_corpus, old_corpus = _joined(corpus)
    return pairs, (new_corpus[rows], old_corpus[rows])


def _both(root: Path, what: str, old_space: EmbeddingSpace | None) -> Both:
    """The stores of texts of the new and of the old model."""
    return (
        EmbeddingStore.open(root / f"new_{what}", "text"),
        EmbeddingStore.open(root / f"old_{what}", "text", old_space),
    )


def _joined(stores: Both) -> tuple[Tensor, Tensor]:
    """New and old vectors of the same items, in the order of the old store."""
    new, old = stores
    place = {name: row for row, name in enumerate(new.ids)}
    alone = set(place) ^ set(old.ids)
    if alone:
        raise DataError(
            f"{new.path} and {old.path} are not of the same items: {min(alone)!r} is in one of them alone; "
            "embed the same with both models"
        )
    rows = [place[name] for name in old.ids]
    return torch.from_numpy(new.rows(rows)), torch.from_numpy(old.read())


def _owners(texts: EmbeddingStore, images: list[str]) -> Tensor:
    """(n,) the row of each text's image."""
    named = _column(texts, IMAGE) or [name.rpartition("#")[0] for name in texts.ids]
    place = {name: row for row, name in enumerate(images)}
    for text, image in zip(texts.ids, named, strict=True):
        if image not in place:
            raise DataError(
                f"the text {text!r} of {texts.path} is of the image {image!r}, which is not among the "
                f"images; give texts whose ids are IMAGE#NUMBER, or a column {IMAGE} in their metadata"
            )
    return torch.tensor([place[image] for image in named])


def _others(corpus: EmbeddingStore, texts: EmbeddingStore) -> Tensor:
    """Rows of the corpus whose captions are not in the pairs, as far as captions are known."""
    held_out, captions = set(_column(texts, CAPTION) or []), _column(corpus, CAPTION)
    rows = range(len(corpus))
    return torch.tensor([row for row in rows if captions is None or captions[row] not in held_out])


def _column(store: EmbeddingStore, name: str) -> list[str] | None:
    if name not in store.columns:
        return None
    values: list[str] = store.metadata([name])[name].to_pylist()
    return values
