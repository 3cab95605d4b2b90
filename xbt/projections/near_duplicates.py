"""Near-duplicates of images and texts, which must not be fitted to on one side and judged on the other.

A photo that was uploaded twice, or a caption of two photos, ties images together: a fit that
learns from one has seen the answer to the other, and in a bootstrap the two say no more than one. Such images
form a cluster, of which a fold holds all or nothing and which is drawn as a whole.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from xbt.projections.pairs import PairVectors
from xbt.vectors import unit_rows

NEAR = 0.99
"""Cosine of two images, less the mean of all, above which they are taken for one photo."""

MAX_COMPARED = 10_000
"""Most images of which each is compared with each; of more only exact copies are found."""

_BLOCK_ROWS = 1024
_APART = 1e-3
"""Distance of two unit rows up to which they are one text: more than half precision rounds."""
_KEYS = 4
_ALL = "near-duplicate images and images with equal texts"

Links = NDArray[np.int64]
"""(m, 2) positions of two items that belong together."""


def clusters_of(pairs: PairVectors, folds: int) -> NDArray[np.int64]:
    """Group the images of the pairs that belong together.

    Images are near-duplicates where their cosine, after the mean of all images is subtracted, exceeds
    :data:`NEAR` under the old model and, if there are new image vectors, under the new one too. Without the
    mean every image of a barely trained model would be one: its vectors all point the same way. Images that
    share a text, equal under both models, belong together as well.

    Args:
        pairs: The pairs.
        folds: How many folds there are to be. Where the largest cluster would hold more than its share of the
            images, first texts are left out of it, then all but exact copies.

    Returns:
        (n_images,) int64: the first image of every image's cluster, itself where it is alone.

    Warns:
        UserWarning: If something was left out.
    """
    exact, near = _exact_links(pairs), _near_links(pairs, folds)
    texts: Links = pairs.image_of_text.numpy()[TextFinder(pairs.new_texts, pairs.old_texts).links()]
    attempts = [("exact copies", exact)]
    if near is not None:
        near = np.concatenate([exact, near])
        attempts = [(_ALL, np.concatenate([near, texts])), ("near-duplicate images", near), *attempts]
    for kept, links in attempts:  # noqa: B007 - the last one is named below
        first = _joined(len(pairs), links)
        if np.bincount(first).max() <= len(pairs) / folds:
            break
    if kept != _ALL:
        warnings.warn(
            f"so many of the {len(pairs)} images of the pairs hang together as near-duplicates or by equal "
            f"texts that {folds} folds cannot hold them, so that only {kept} are kept together; if images or "
            "texts are there twice, leave the copies out",
            stacklevel=4,
        )
    return first


def fold_of_clusters(clusters: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Draw the (n_images,) fold of every image.

    Folds hold whole clusters, and as many of them each as can be. Where every image is a cluster of its own,
    they are those of :meth:`PairVectors.folds`.

    Args:
        clusters: (n_images,) the first image of every image's cluster.
        folds: How many, at most as many as there are clusters.
        seed: Fixes them.
    """
    order = np.random.default_rng(seed).permutation(len(clusters))
    place = np.empty(len(clusters), dtype=np.int64)
    for fold, part in enumerate(np.array_split(order[clusters[order] == order], folds)):
        place[part] = fold
    return place[clusters]


class TextFinder:
    """Finds texts that are equal to known ones under both models, in any float precision.

    Equal rows have equal inner products with any direction. A row is therefore compared only with the known
    rows whose product with one random direction is about its own: time grows with the rows alone.

    Args:
        new: (n, new_dim) vectors of the known texts under the new model.
        old: (n, old_dim) under the old one.
    """

    def __init__(self, new: Tensor, old: Tensor) -> None:
        self._dims = new.shape[1], old.shape[1]
        units = [unit_rows(side.float()) for side in (new, old)]
        self._means = [side.mean(dim=0) for side in units]
        generator = torch.Generator().manual_seed(0)
        self._directions = normalize(torch.randn(self._dims[0], _KEYS, generator=generator), dim=0)
        # A row and its like differ by little along one of many directions.
        self._tolerance = 4 * _APART / max(16, self._dims[0]) ** 0.5
        rows = self._centred(new, old)
        self._order = torch.argsort(rows[0] @ self._directions[:, 0], stable=True)
        self._rows = tuple(side[self._order] for side in rows)
        self._keys = self._rows[0] @ self._directions
        self._lowest = self._keys[:, 0].contiguous()

    def known(self, new: Tensor, old: Tensor) -> Tensor:
        """(k,) booleans: which of some texts are known; none of them where their dimensions are others."""
        if (new.shape[1], old.shape[1]) != self._dims or len(new) == 0:
            return torch.zeros(len(new), dtype=torch.bool)
        rows = self._centred(new, old)
        keys = rows[0] @ self._directions
        start = torch.searchsorted(self._lowest, keys[:, 0] - self._tolerance)
        return self._first_equal(rows, keys, start) >= 0

    def links(self) -> Links:
        """Link the known texts that are equal: each with the next one, so that a chain holds all of them."""
        start = torch.arange(1, len(self._lowest) + 1)
        found = self._first_equal(self._rows, self._keys, start)
        has = torch.nonzero(found >= 0).flatten()
        pairs: Links = torch.stack([self._order[has], self._order[found[has]]], dim=1).numpy()
        return pairs

    def _centred(self, new: Tensor, old: Tensor) -> tuple[Tensor, ...]:
        """Unit rows about the known texts' mean, so that a cone of vectors opens."""
        units = (unit_rows(side.detach().float().cpu()) for side in (new, old))
        return tuple(unit_rows(unit - mean) for unit, mean in zip(units, self._means, strict=True))

    def _first_equal(self, rows: tuple[Tensor, ...], keys: Tensor, start: Tensor) -> Tensor:
        """(k,) the first known row from ``start`` on, by its first key, that equals each row; or -1."""
        stop = torch.searchsorted(self._lowest, keys[:, 0] + self._tolerance, right=True)
        found = torch.full((len(keys),), -1)
        active, place = torch.nonzero(start < stop).flatten(), start
        while len(active):
            at = place[active]
            alike = ((self._keys[at] - keys[active]).abs() <= self._tolerance).all(dim=1)
            own, theirs = active[alike], at[alike]
            for side, known in zip(rows, self._rows, strict=True):
                same = (side[own] - known[theirs]).norm(dim=1) <= _APART
                own, theirs = own[same], theirs[same]
            found[own] = theirs
            place = place + 1
            active = active[(found[active] < 0) & (place[active] < stop[active])]
        return found


def _exact_links(pairs: PairVectors) -> Links:
    """Images whose vectors are the same bit by bit."""
    sides = [pairs.old_images] if pairs.new_images is None else [pairs.old_images, pairs.new_images]
    _, owner, counts = np.unique(
        torch.cat(sides, dim=1).numpy(), axis=0, return_inverse=True, return_counts=True
    )
    order = np.argsort(owner.reshape(-1), kind="stable")
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rest = np.setdiff1d(np.arange(len(order)), begins)
    return np.stack([order[rest - 1], order[rest]], axis=1)


def _near_links(pairs: PairVectors, folds: int) -> Links | None:
    """Images that look the same under every model; ``None`` where they are too many to fit into folds."""
    count = len(pairs)
    none = np.empty((0, 2), dtype=np.int64)
    if count > MAX_COMPARED:
        return none
    sides = [
        unit_rows(side - side.mean(dim=0))
        for side in (pairs.old_images, pairs.new_images)
        if side is not None
    ]
    found, total = [none], 0
    for start in range(0, count, _BLOCK_ROWS):
        near = torch.ones(min(_BLOCK_ROWS, count - start), count - start, dtype=torch.bool)
        for side in sides:
            near &= side[start : start + _BLOCK_ROWS] @ side[start:].T > NEAR
        links = start + torch.nonzero(near.triu(1)).numpy()
        total += len(links)
        # Clusters that fit into folds cannot have more links than this.
        if total > count**2 / (2 * folds):
            return None
        found.append(links)
    return np.concatenate(found)


def _joined(count: int, links: Links) -> NDArray[np.int64]:
    """(count,) the first item of every item's cluster."""
    first = np.arange(count)
    while True:
        before = first.copy()
        for one, other in ((0, 1), (1, 0)):
            np.minimum.at(first, links[:, one], before[links[:, other]])
        first = first[first]
        if np.array_equal(first, before):
            return first
