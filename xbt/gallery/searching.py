"""Searching a gallery and reading from it, by many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import DataError
from xbt.gallery.checks import as_ids, as_k, as_queries
from xbt.gallery.contents import OLD, Contents, Place, require_space
from xbt.gallery.home import Home
from xbt.gallery.known import KnownGallery
from xbt.gallery.part import Part
from xbt.gallery.part_view import PartView
from xbt.gallery.result import SearchResult
from xbt.index.mixed import Merge, merge_hits
from xbt.index.protocol import Hits
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors


class SearchableGallery(KnownGallery):
    """See :class:`~xbt.gallery.Gallery`. A search takes views, which never change, and holds no lock.

    An index is made by the thread that finds that one is due, under a lock of its own: others search with
    what there is meanwhile.
    """

    def __init__(self, contents: Contents | None, home: Home | None = None) -> None:
        self._indexing = threading.Lock()
        super().__init__(contents, home)

    def vectors(self, ids: Sequence[str], part: str | None = None) -> NDArray[np.float32]:
        """Stored vectors of items.

        Args:
            ids: Of items of the gallery.
            part: Take them from this part. The old part has the old vectors of backfilled items, too, until
                :meth:`compact`. Left out, all the items must be searched in the same part.

        Returns:
            (n, dim) float32, in the order asked for.

        Raises:
            DataError: If an item is not there, or items of two parts are asked for at once.
            StoreError: If a file is damaged or gone.
        """
        with self._state:
            home, rows = self._rows(ids, part)
            vectors = home.vectors(rows)
            return vectors if vectors.flags.writeable else vectors.copy()  # a view of what is in memory

    def metadata(self, ids: Sequence[str], part: str | None = None) -> pa.Table | None:
        """Columns that were added beside items; ``None`` if there are none.

        Args:
            ids: As in :meth:`vectors`.
            part: As in :meth:`vectors`.

        Returns:
            A table with one row an item, in the order asked for.

        Raises:
            DataError: As :meth:`vectors`.
            StoreError: As :meth:`vectors`.
        """
        with self._state:
            home, rows = self._rows(ids, part)
            return home.metadata(rows)

    def search(
        self, vectors: Vectors, k: int = 10, space: EmbeddingSpace | None = None, part: str | None = None
    ) -> SearchResult:
        """Finds the k items with the largest inner product for every query.

        Args:
            vectors: (n_queries, dim) query vectors, or one of shape (dim,).
            k: Items per query, from 1 to the size of the gallery: there are always k results.
            space: The space the queries live in. Pass it: queries of another model give scores that mean
                nothing.
            part: Search the items of this part only. Needed while items are in two parts; to search both, see
                :meth:`search_mixed`.

        Raises:
            DataError: If k is out of range, there are no queries, a value is NaN, or items are in two parts.
            SpaceMismatchError: If the space or the dimension is not the gallery's.
            StoreError: If a file that has to be read is damaged or gone.
        """
        view = self._view(part)
        k = as_k(k, view.count)
        require_space(view, space, "the query vectors")
        scores, ids = view.search(as_queries(vectors, "query vectors", view.dim), k)
        return SearchResult(ids, scores)

    def search_mixed(
        self,
        old_queries: Vectors,
        new_queries: Vectors,
        k: int,
        merge: Merge,
        old_space: EmbeddingSpace | None = None,
        new_space: EmbeddingSpace | None = None,
    ) -> SearchResult:
        """Searches both parts, each with queries of its own space, and merges what is found.

        Args:
            old_queries: (n, old_dim) queries in the old part's space.
            new_queries: (n, new_dim) the same queries in the new part's.
            k: Items per query, from 1 to the size of the gallery.
            merge: Puts both parts' scores on one scale, or interleaves the parts by rank.
            old_space: The space of the old queries.
            new_space: The space of the new queries.

        Returns:
            The result, with the merge's scores. As long as one part is empty, it is exactly what the other
            one alone gives. Of a gallery of one part, that is what the old queries find, unless the part was
            begun by :meth:`begin_part`: once :meth:`compact` has dropped the old one, the new queries count.

        Raises:
            DataError: If k is out of range, a value is NaN, or there are not as many old queries as new ones.
            SpaceMismatchError: If the space or dimension of queries is not their part's.
            StoreError: If a file that has to be read is damaged or gone.
        """
        views = self._all_views()
        if len(old_queries) != len(new_queries):
            raise DataError(
                f"there are {len(old_queries)} old queries and {len(new_queries)} new ones; give each query "
                "in both spaces"
            )
        k = as_k(k, sum(view.count for view in views))
        asked = [(old_queries, old_space, "old"), (new_queries, new_space, "new")]
        if len(views) == 1 and views[0].name != OLD:
            asked = asked[1:]
        found = []
        for view, (queries, space, name) in zip(views, asked, strict=False):
            require_space(view, space, f"the {name} query vectors")
            rows = as_queries(queries, f"{name} query vectors", view.dim)
            found.append(view.search(rows, min(k, view.count)))
        sizes = [view.count for view in views]
        if 0 in sizes or len(views) == 1:
            scores, ids = found[0 if sizes[0] else 1]
            return SearchResult(ids, scores)
        hits = merge_hits(merge, *(Hits(ids, scores) for scores, ids in found), k, (sizes[0], sizes[1]))
        return SearchResult(hits.ids, hits.scores)

    def prepare(self) -> None:
        """Does now what the first search would do: reads what it needs, and makes or updates an index.

        Raises:
            StoreError: If a file that has to be read is damaged or gone.
        """
        self._all_views(wait=True)

    def prepare_index(self) -> None:
        """Makes or updates the index, if the gallery has one; of the index ``"Flat"`` nothing is read.

        What a writer calls now and then for the sake of readers that map the index: until there is one, they
        read all rows for every search.

        Raises:
            StoreError: If a file that has to be read is damaged or gone.
        """
        with self._state:
            exact = self._known.old.plan.exact
        if not exact:
            self.prepare()

    def _all_views(self, wait: bool = False) -> tuple[PartView, ...]:
        """Views of all parts, with an index where one is due, unless another thread is making it."""
        views = self._current_views()
        if any(view.due for view in views) and self._indexing.acquire(blocking=wait):
            try:
                self._make_indexes()
            finally:
                self._indexing.release()
            views = self._current_views()
        return views

    def _make_indexes(self) -> None:
        with self._state:
            known = self._known
            due = [
                (part, view)
                for part, view in zip(known.parts, self._current_views(), strict=True)
                if view.due
            ]
        for part, view in due:
            index = part.made_index(view)
            with self._state:
                if self._contents is known:  # and was not compacted in between
                    part.adopt(index)
                    self._views = None

    def _current_views(self) -> tuple[PartView, ...]:
        views = self._views
        if views is None:
            with self._state:
                if self._views is None:
                    self._views = self._known.views(None if self._home is None else self._home.journal)
                views = self._views
        return views

    def _rows(self, ids: Sequence[str], part: str | None) -> tuple[Part, list[int]]:
        places = [self._place(item, part) for item in as_ids(ids, "ids")]
        homes = {place.part.name: item for place, item in zip(places, ids, strict=True)}
        if len(homes) > 1:
            (first, one), (second, other) = list(homes.items())[:2]
            raise DataError(
                f"{one!r} is in the part {first!r}, but {other!r} in {second!r}; ask for the items of one "
                "part at a time"
            )
        return places[0].part if places else self._alone(), [place.row for place in places]

    def _place(self, item: str, part: str | None) -> Place:
        if part is None:
            found = self._known.find(item)
        else:
            home = self._known.part(part)
            row = home.row(item)
            found = None if row is None else Place(home, row)
        if found is None:
            where = "gallery" if part is None else f"part {part!r}"
            raise DataError(f"the id {item!r} is not in the {where}; check the id, or reload the gallery")
        return found

    def _view(self, part: str | None) -> PartView:
        """The part to be searched alone: the one that is named, or the one that all items are in."""
        views = self._all_views()
        if part is not None:
            return views[[view.name for view in views].index(self._known.part(part).name)]
        there = [view for view in views if view.count] or [views[0]]
        if len(there) > 1:
            raise DataError(
                f"the gallery is being backfilled: {views[0].count} items are in the part {views[0].name!r} "
                f"and {views[1].count} in {views[1].name!r}; use search_mixed(), or name one with part="
            )
        return there[0]
