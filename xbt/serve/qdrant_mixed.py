"""What was found in both parts of a collection becomes one list."""

from __future__ import annotations

from xbt.gallery.merge import Merge
from xbt.gallery.mixing import merged
from xbt.serve.qdrant_points import Found


def merge_found(old: Found, new: Found, k: int, merge: Merge, sizes: tuple[int, int]) -> Found:
    """Merges two lists per query, as a gallery of two parts does.

    Args:
        old: What was found among the items that are not backfilled.
        new: What was found among those that are. An item that is in both lists was backfilled while they were
            made; its old place does not count.
        k: How many to keep; fewer if there are not as many.
        merge: How.
        sizes: Items of the old and of the new part.

    Returns:
        Per query the ids and the merge's scores; where one list is empty, the other as it is.
    """
    together: Found = []
    for first, second in zip(old, new, strict=True):
        ids, scores = first
        kept = [place for place, item in enumerate(ids) if item not in set(second[0])]
        if not kept or not second[0]:
            alone = second if second[0] else first
            together.append((alone[0][:k], alone[1][:k]))
            continue
        mine, theirs = (scores[kept][None], [[ids[place] for place in kept]]), (second[1][None], [second[0]])
        result = merged(merge, mine, theirs, min(k, len(kept) + len(second[0])), sizes)
        together.append((result.ids[0], result.scores[0]))
    return together
