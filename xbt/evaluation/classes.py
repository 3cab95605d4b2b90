"""Exact retrieval among labelled vectors: CMC and mean average precision.

An item is relevant to a query if both have the same label. CMC top-k is the share of the queries with a
relevant item among their first k, as in re-identification and in the papers on compatible representations.
Average precision is the mean, over the relevant items, of the precision at the item's score. Equal scores are
handled as in ``sklearn.metrics.average_precision_score``. The query's own copy in the gallery is left out by
its id, never by its label.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError, SpaceMismatchError
from xbt.evaluation import retrieval
from xbt.evaluation.retrieval import check_ks
from xbt.vectors import Vectors, as_vectors, unit_rows

Labels = Tensor | NDArray[np.integer] | Sequence[int]
Ids = Sequence[Hashable] | Tensor | NDArray[Any]


@dataclass(frozen=True)
class LabelRetrieval:
    """CMC and mean average precision of queries for items of their class.

    Attributes:
        cmc: k → share of the queries with an item of their class among the first k.
        mean_average_precision: Mean of the average precision over the queries.
        n_queries: Number of queries with an item of their class in the gallery; only they count.
        n_without_positive: Number of queries that are left out because their class is not in the gallery.
        first_ranks: (n_queries,) int64, the number of other items that score at least as high as the best
            relevant one: ties are ranked pessimistically.
        average_precisions: (n_queries,) float64, in the order of the queries.
    """

    cmc: dict[int, float]
    mean_average_precision: float
    n_queries: int
    n_without_positive: int
    first_ranks: Tensor
    average_precisions: Tensor

    def metrics(self) -> dict[str, float]:
        """``{"top1": ..., "top5": ..., "mAP": ...}``, fractions between 0 and 1."""
        tops = {f"top{k}": value for k, value in self.cmc.items()}
        return tops | {"mAP": self.mean_average_precision}

    def to_dict(self) -> dict[str, float | int]:
        """A JSON-able form: the metrics and the two counts."""
        return {**self.metrics(), "n_queries": self.n_queries, "n_without_positive": self.n_without_positive}


def evaluate_labels(
    query_vectors: Vectors,
    query_labels: Labels,
    gallery_vectors: Vectors | None = None,
    gallery_labels: Labels | None = None,
    *,
    query_ids: Ids | None = None,
    gallery_ids: Ids | None = None,
    ks: Sequence[int] = (1, 5),
    chunk_size: int | None = None,
) -> LabelRetrieval:
    """Measure the retrieval of items of each query's class, by cosine.

    Scores are float32 (float64 when either input is), never lower. Vectors of different dimensions are
    refused; :func:`xbt.evaluation.prefix_vectors` cuts them to a common prefix.

    Args:
        query_vectors: (n_queries, dim) torch tensor or numpy array of any float dtype; rows of any length.
        query_labels: (n_queries,) integers.
        gallery_vectors: (n_gallery, dim) likewise; by default the queries are their own gallery.
        gallery_labels: (n_gallery,) integers, given with ``gallery_vectors``.
        query_ids: One id per query; the gallery item with this id is left out of the query's ranking.
        gallery_ids: One unique id per gallery item. Without ids nothing is left out, unless the queries are
            their own gallery: then every query is left out of its own ranking.
        ks: Cut-offs of CMC, each at least 1. A k beyond the gallery gives 1.0.
        chunk_size: Queries per block of scores; by default a block has at most 64 MiB.

    Raises:
        DataError: If vectors are empty or hold NaN, labels or ids do not fit the vectors, an id occurs twice
            in the gallery, only one side has ids, no query has an item of its class, or ``ks`` or
            ``chunk_size`` holds anything but integers of at least 1.
        SpaceMismatchError: If the dimensions differ.

    Example:
        >>> report = evaluate_labels(model.encode_images(images), labels)  # self test
        >>> report.cmc[1], report.mean_average_precision
    """
    checked_ks = check_ks(ks)
    if (gallery_vectors is None) != (gallery_labels is None):
        raise DataError("gallery_vectors and gallery_labels belong together; give both or neither")
    queries = unit_rows(as_vectors(query_vectors, "queries"))
    label_of_query = _as_labels(query_labels, "query_labels")
    if gallery_vectors is None or gallery_labels is None:
        if gallery_ids is not None:
            raise DataError("gallery_ids were given without a gallery; give query_ids alone")
        items, labels = queries, label_of_query
        gallery_ids = query_ids = range(len(queries)) if query_ids is None else query_ids
    else:
        items = unit_rows(as_vectors(gallery_vectors, "gallery"))
        labels = _as_labels(gallery_labels, "gallery_labels")
    _check_lengths("queries", len(queries), query_labels=label_of_query, query_ids=query_ids)
    _check_lengths("gallery items", len(items), gallery_labels=labels, gallery_ids=gallery_ids)
    if queries.shape[1] != items.shape[1]:
        raise SpaceMismatchError(
            f"queries have dimension {queries.shape[1]} but the gallery has {items.shape[1]}; compare them "
            "on their common prefix with prefix_vectors, or embed the queries into the gallery's space"
        )
    excluded = _own_items(query_ids, gallery_ids, len(queries))
    order = np.argsort(labels, kind="stable")
    gallery = _ByClass(*retrieval.distinct_rows(items.numpy()[order]), labels[order], np.argsort(order))
    ranks, precisions = _rank(queries, label_of_query, gallery, excluded, chunk_size)
    counted = ranks >= 0
    if not counted.any():
        raise DataError("no query has an item of its class in the gallery; check that the labels agree")
    first, average = ranks[counted], precisions[counted]
    return LabelRetrieval(
        {k: int((first < k).sum()) / len(first) for k in checked_ks},
        float(average.mean()),
        len(first),
        int((~counted).sum()),
        torch.from_numpy(first),
        torch.from_numpy(average),
    )


class _ByClass(NamedTuple):
    """Gallery sorted by class: distinct vectors, each item's column among them, and ascending labels.

    ``positions`` are those of the gallery rows in the sorted order.
    """

    distinct: NDArray[Any]
    columns: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]


def _rank(
    queries: Tensor,
    labels: NDArray[np.int64],
    gallery: _ByClass,
    excluded: NDArray[np.int64],
    chunk_size: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(n,) ranks of the first relevant item and (n,) average precisions; -1 and NaN if there is none."""
    dtype = np.promote_types(queries.numpy().dtype, gallery.distinct.dtype)
    rows, columns = queries.numpy().astype(dtype), gallery.distinct.astype(dtype)
    size = len(gallery.labels)
    if chunk_size is None:
        chunk_size = max(1, retrieval.SCORE_BYTES // (dtype.itemsize * size))
    elif isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer) or chunk_size < 1:
        raise DataError(
            f"chunk_size is {chunk_size!r}; give an integer of at least 1, or None for the default"
        )
    left_out = np.where(excluded >= 0, gallery.positions[excluded], -1)
    firsts = np.searchsorted(gallery.labels, labels, "left")
    lasts = np.searchsorted(gallery.labels, labels, "right")
    ranks, precisions = np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), np.nan)
    for start in range(0, len(rows), chunk_size):
        scores = rows[start : start + chunk_size] @ columns.T
        if len(columns) < size:
            scores = scores[:, gallery.columns]
        affected = np.flatnonzero(left_out[start : start + chunk_size] >= 0)
        scores[affected, left_out[start + affected]] = -np.inf
        bounds = zip(firsts[start:], lasts[start:], scores, strict=False)
        relevant = [np.sort(row[first:last]) for first, last, row in bounds]
        scores.sort(axis=1)
        for number, (row, class_scores) in enumerate(zip(scores, relevant, strict=True), start):
            class_scores = class_scores[np.searchsorted(class_scores, -np.inf, "right") :]
            if len(class_scores):
                above = size - np.searchsorted(row, class_scores, "left")
                right_above = len(class_scores) - np.searchsorted(class_scores, class_scores, "left")
                ranks[number] = above[-1] - right_above[-1]
                precisions[number] = (right_above / above).mean()
    return ranks, precisions


def _as_labels(labels: Labels, name: str) -> NDArray[np.int64]:
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim != 1 or (values.dtype.kind not in "iu" and len(values)):
        raise DataError(
            f"{name} must hold one integer per vector, got {values.dtype} of shape {values.shape}; number "
            "the classes"
        )
    return values.astype(np.int64)


def _check_lengths(what: str, count: int, **given: Any) -> None:
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise DataError(f"{name} has {len(values)} entries for {count} {what}; give one each")


def _own_items(query_ids: Ids | None, gallery_ids: Ids | None, n_queries: int) -> NDArray[np.int64]:
    """(n_queries,) gallery row with the query's id, or -1 if there is none."""
    if query_ids is None and gallery_ids is None:
        return np.full(n_queries, -1, dtype=np.int64)
    if query_ids is None or gallery_ids is None:
        missing = "query_ids" if query_ids is None else "gallery_ids"
        raise DataError(f"{missing} are missing, but the other side has ids; give both or neither")
    row_of: dict[Hashable, int] = {}
    for row, name in enumerate(_plain(gallery_ids)):
        if name in row_of:
            raise DataError(f"the gallery id {name!r} occurs twice, again in row {row}; ids must be unique")
        row_of[name] = row
    return np.array([row_of.get(name, -1) for name in _plain(query_ids)], dtype=np.int64)


def _plain(ids: Ids) -> list[Hashable]:
    # Elements of tensors and arrays hash differently from Python numbers.
    return ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
