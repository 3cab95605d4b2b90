"""Approximate indexes of FAISS: which one, how it is made, kept on disk and kept up to date.

FAISS is imported when the first index is made and not before: torch and faiss-cpu in one process abort on
macOS when both load OpenMP at import.

The files of an index are a cache beside the vectors, from which it can be made again at any time:

    index/<part>.json            what was indexed, and which files hold it; written last
    index/<part>-<token>.faiss   FAISS's own file
    index/<part>-<token>.rows    row numbers of its entries, int64

Files are never changed: a new index has new ones, and a process that has mapped the old ones keeps them.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.errors import ConfigError, StoreError, XbtError
from xbt.files import Sink, checksum, write_bytes, write_record, write_whole, writing_to
from xbt.index.exact_search import BLOCK_NUMBERS, MISSING, ExactRows, Gather
from xbt.store.layout import read_record

EXACT = "Flat"
"""The index that is none: every row is compared."""
FOLDER = "index"
ROWS_PER_CENTROID = 39
"""Below this many rows per centroid FAISS warns that k-means has too few; then rows are searched exactly."""
OPQ_CENTROIDS = 256
"""Centroids of the quantiser with which FAISS learns OPQ's rotation, whatever the codes are."""
COARSE_PROPOSALS = 4
"""Rows that an index of compressed vectors proposes for each one wanted."""
TRAINING_ROWS_PER_CENTROID = 256
"""FAISS's k-means takes no more than this many rows per centroid."""
TRAINING_ROWS = 65_536
"""Rows that are used at most to train anything else, such as a scalar quantiser."""
ROWS_AT_ONCE = 65_536
"""Rows that are read and added at once."""
MOST_PROPOSED = 16_384
"""Rows that an index is asked for at most, to find enough that are not masked."""
LEAST_TAIL = 10_000
"""Rows that may have come since an approximate index was made, and are searched exactly beside it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexPlan:
    """Kind of index that a gallery has.

    Attributes:
        factory: A string of FAISS's ``index_factory``, such as ``"Flat"``, ``"IVF1024,Flat"``,
            ``"HNSW32"`` or ``"IVF4096,PQ64"``.
        tuning: Search parameters as FAISS's ``ParameterSpace`` reads them, such as ``"nprobe=64"`` or
            ``"efSearch=128"``. Empty, an inverted file looks into √n of its n lists, and everything else is
            left as FAISS has it.
    """

    factory: str = EXACT
    tuning: str = ""

    @property
    def exact(self) -> bool:
        """Whether every row is compared."""
        return self.factory == EXACT

    @property
    def proposals(self) -> int:
        """Rows that are proposed for each one wanted: more where codes are coarse and proposals uncertain."""
        return COARSE_PROPOSALS if re.search("PQ|SQ|LSH|RQ|PCA", self.factory) else 1

    def check(self, dim: int) -> None:
        """Refuse an index that FAISS does not know; for ``"Flat"`` FAISS is not even imported.

        Raises:
            ConfigError: If the string or the tuning cannot be used; the message quotes FAISS.
        """
        if not self.exact:
            self.make(dim)
            if re.search(r"\bIDMap2?\b", self.factory):
                raise ConfigError(
                    f"the index {self.factory!r} numbers its rows itself, but that is what the gallery does; "
                    "leave IDMap out"
                )
        elif self.tuning:
            raise ConfigError(
                f"the tuning {self.tuning!r} is for an approximate index, but the index is {EXACT!r}; leave "
                "it out, or choose an index such as 'IVF1024,Flat'"
            )

    def require_inverted_file(self, dim: int) -> None:
        """Refuse an index that cannot be mapped from disk.

        Raises:
            ConfigError: If it is no inverted file.
        """
        import faiss

        if self.exact or faiss.try_extract_index_ivf(self.make(dim)) is None:
            raise ConfigError(
                f"the index {self.factory!r} cannot be mapped, only inverted files can; leave mmap out, or "
                "make the gallery with an index such as 'IVF1024,Flat'"
            )

    def make(self, dim: int) -> Any:
        """Make an empty index.

        Raises:
            ConfigError: If the string or the tuning cannot be used.
        """
        import faiss

        try:
            index = faiss.index_factory(dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ConfigError(
                f"the index {self.factory!r} cannot be made for dimension {dim} ({_said(error)}); give a "
                "string of FAISS's index_factory, such as 'Flat', 'IVF1024,Flat' or 'HNSW32'"
            ) from error
        self.tune(index)
        return index

    def tune(self, index: Any) -> None:
        """Set the search parameters of an index.

        Raises:
            ConfigError: If FAISS does not know one of them for this index.
        """
        import faiss

        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            ivf.nprobe = max(1, math.isqrt(ivf.nlist))
        if self.tuning:
            try:
                space: Any = faiss.ParameterSpace()
                space.set_index_parameters(index, self.tuning)
            except RuntimeError as error:
                raise ConfigError(
                    f"the tuning {self.tuning!r} does not fit the index {self.factory!r} ({_said(error)}); "
                    "give parameters such as 'nprobe=64' for IVF or 'efSearch=128' for HNSW"
                ) from error

    def fewest_rows(self, dim: int) -> int:
        """Rows from which on the index is worth making, and can be trained; fewer are searched exactly."""
        index = self.make(dim)
        centroids = max(_largest_codebook(index), OPQ_CENTROIDS if "OPQ" in self.factory else 1)
        return 1 if index.is_trained else max(dim, ROWS_PER_CENTROID * centroids)


def _largest_codebook(index: Any) -> int:
    """Centroids of the largest codebook that an index learns by k-means; 1 if it learns none."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    most = 1 if ivf is None else int(ivf.nlist)
    inner = index if ivf is None else ivf
    while isinstance(inner, faiss.IndexPreTransform | faiss.IndexRefine):
        inner = faiss.downcast_index(inner.index if hasattr(inner, "index") else inner.base_index)
    quantiser = getattr(faiss.downcast_index(inner), "pq", None)
    return most if quantiser is None else max(most, int(quantiser.ksub))


def _said(error: RuntimeError) -> str:
    """The end of FAISS's message, without the place in its source."""
    return str(error).rstrip().rsplit(": ", maxsplit=1)[-1]


@dataclass(frozen=True)
class ApproximateIndex:
    """An index over some of a part's rows; immutable, so that many threads may search it.

    Attributes:
        index: FAISS's.
        rows: (n,) int64 row numbers of its entries, ascending.
        upto: The row before which the rows end that it was made from; later ones are not in it.
        proposals: Rows to ask for, for each one wanted.
    """

    index: Any
    rows: NDArray[np.int64]
    upto: int
    proposals: int = 1

    def propose(
        self, queries: NDArray[np.float32], wanted: int, masked: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Rows that are likely to be the best.

        Args:
            queries: (n, dim).
            wanted: Rows a query.
            masked: (m,) bool by row number: rows that are not to be found.

        Returns:
            (n, wanted) row numbers, none twice, in the index's order;
            :data:`~xbt.index.exact_search.MISSING` where it has found fewer.
        """
        fetched = min(wanted, len(self.rows))
        while True:
            _, places = self.index.search(queries, fetched)
            known = (places >= 0) & (places < len(self.rows))
            rows = np.where(known, self.rows[np.where(known, places, 0)], MISSING)
            rows[(rows >= 0) & masked[rows]] = MISSING
            enough = (rows >= 0).sum(axis=1) >= wanted
            # An inverted file that gives less than it is asked for has no more in the lists it looks into.
            if fetched >= min(len(self.rows), MOST_PROPOSED) or (enough | (places[:, -1] < 0)).all():
                break
            fetched = min(4 * fetched, len(self.rows), MOST_PROPOSED)
        order = np.argsort(rows < 0, axis=1, kind="stable")[:, :wanted]
        proposed: NDArray[np.int64] = np.take_along_axis(rows, order, axis=1)
        return proposed


def train(plan: IndexPlan, dim: int, rows: NDArray[np.int64], upto: int, gather: Gather) -> ApproximateIndex:
    """Make an index of rows, trained on an even sample of them.

    Args:
        plan: Kind of index.
        dim: Dimension of the vectors.
        rows: (n,) row numbers, ascending; at least :meth:`IndexPlan.fewest_rows`.
        upto: See :class:`ApproximateIndex`.
        gather: Gives rows' vectors.

    Returns:
        The index.

    Raises:
        StoreError: If rows cannot be read, or FAISS cannot make the index of them.
    """
    index = plan.make(dim)
    try:
        if not index.is_trained:
            most = max(TRAINING_ROWS, TRAINING_ROWS_PER_CENTROID * _largest_codebook(index))
            index.train(gather(rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            index.add(gather(rows[start : start + ROWS_AT_ONCE]))
    except RuntimeError as error:
        raise StoreError(
            f"the index {plan.factory!r} cannot be made of {len(rows)} vectors ({_said(error)}); check them "
            "with verify(), or make the gallery with the index 'Flat'"
        ) from error
    return ApproximateIndex(index, rows, upto, plan.proposals)


@dataclass(frozen=True)
class IndexCache:
    """Files of one part's index.

    Attributes:
        folder: The gallery's folder ``index/``.
        part: The part's name, which is part of file names.
        plan: Kind of index.
        segments_now: Gives the names of the part's segments as they are on disk at the moment.
        mmap: Whether the index is mapped rather than read; inverted files only.
        read_only: Whether nothing may be written.
    """

    folder: Path
    part: str
    plan: IndexPlan
    segments_now: Callable[[], list[str]]
    mmap: bool = False
    read_only: bool = False

    def load(self, segments: list[str], count: int, dim: int) -> ApproximateIndex | None:
        """Read the index, if there is one of these rows.

        Args:
            segments: Names of the part's segments.
            count: Rows of the part.
            dim: Dimension of their vectors.

        Returns:
            The index; ``None`` if there is none, it is of other rows or another kind, or it is damaged: it
            can be made again.
        """
        record = self._record()
        if record is None:
            return None
        try:
            if not self._is_of(record, segments) or not 0 <= record["upto"] <= count:
                return None
            if faults := self.faults():
                raise StoreError(faults[0])
            return self._read(record, dim)
        # A file that was altered can make FAISS raise almost anything; it is a cache, and is made again.
        except (XbtError, LookupError, TypeError, AttributeError, OSError, ValueError, ArithmeticError,
                RuntimeError, MemoryError) as error:  # fmt: skip
            _log.warning("the index in %s is made again: %s", self.folder, error)
            return None

    def save(self, made: ApproximateIndex, segments: list[str]) -> bool:
        """Write an index, and remove the files of the one before.

        A search makes an index that is missing, without the right to write to the gallery. So an index is not
        kept if another process writes one at the same moment, if its rows are no longer the gallery's, or if
        a newer one is there.

        Returns:
            Whether it was written.

        Raises:
            StoreError: If the disk is full or may not be written to.
        """
        if self.folder.is_symlink():
            raise StoreError(f"{self.folder} is a link, which is not followed; put a directory in its place")
        with writing_to(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder) as alone:
            if not alone or not self._is_wanted(made, segments):
                return False
            self._write(made, segments)
        return True

    def remove(self) -> None:
        """Remove the files of a part that is gone; failures are left to the next time."""
        for path in () if self.folder.is_symlink() else self.folder.glob("*"):
            if re.fullmatch(rf"{self.part}(\.json|-[0-9a-f]{{8}}\.(faiss|rows))", path.name):
                path.unlink(missing_ok=True)

    def faults(self) -> list[str]:
        """List damage to the files, a sentence each."""
        try:
            record = self._record()
            files = {} if record is None else {name: record["files"][name] for name in self._names(record)}
            damaged = [
                path
                for path, file in ((self.folder / name, file) for name, file in files.items())
                if not path.is_file() or path.is_symlink() or checksum(path) != file["sha256"]
            ]
        except (LookupError, TypeError, AttributeError, OSError, StoreError) as error:
            return [f"{self.folder / self.part}.json is damaged ({error!r}): remove {self.folder}"]
        return [f"{path} is missing or damaged: remove {self.folder}, it is made again" for path in damaged]

    def _write(self, made: ApproximateIndex, segments: list[str]) -> None:
        import faiss

        token = secrets.token_hex(4)
        names = {"faiss": f"{self.part}-{token}.faiss", "rows": f"{self.part}-{token}.rows"}

        def write_index(sink: Sink) -> None:
            failures: list[OSError] = []

            def write(data: Any) -> int:
                try:
                    return sink.write(data)
                except OSError as error:
                    failures.append(error)
                    raise

            library: Any = faiss  # FAISS buffers nothing itself, and calls back with what it has
            try:
                library.write_index(made.index, library.PyCallbackIOWriter(write))
            except RuntimeError as error:
                raise (failures[0] if failures else OSError(errno.EIO, _said(error))) from error

        needed = 4 * made.index.d * len(made.rows)  # about; codes take less, and graphs more
        files = {
            names["faiss"]: write_whole(self.folder / names["faiss"], needed, write_index),
            names["rows"]: write_bytes(self.folder / names["rows"], made.rows.astype("<i8").tobytes()),
        }
        plain = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}
        what = {"index": self.plan.factory, "segments": segments, "upto": made.upto}
        write_record(self.folder / f"{self.part}.json", {**what, **names, "files": plain})
        with writing_to(self.folder, 0):
            for path in self.folder.glob(f"{self.part}-*"):
                if path.name not in files:
                    path.unlink(missing_ok=True)

    def _is_of(self, record: dict[str, Any], segments: list[str]) -> bool:
        """Whether a record is of this kind of index, and of rows that these segments begin with."""
        known: list[str] = record["segments"]
        return bool(record["index"] == self.plan.factory and known == segments[: len(known)])

    def _is_wanted(self, made: ApproximateIndex, segments: list[str]) -> bool:
        try:
            now = self.segments_now()
        except StoreError:
            return False
        record = self._record()
        try:
            behind = record is not None and self._is_of(record, now) and record["upto"] > made.upto
        except (LookupError, TypeError):
            behind = False
        return now[: len(segments)] == segments and not behind

    def _record(self) -> dict[str, Any] | None:
        path = self.folder / f"{self.part}.json"
        try:
            return read_record(path) if path.is_file() and not self.folder.is_symlink() else None
        except StoreError:
            return None

    def _names(self, record: dict[str, Any]) -> tuple[str, str]:
        """Names of both files; a stranger's record cannot name others."""
        names = record["faiss"], record["rows"]
        for name, ending in zip(names, ("faiss", "rows"), strict=True):
            if not re.fullmatch(rf"{self.part}-[0-9a-f]{{8}}\.{ending}", name):
                raise StoreError(
                    f"{self.folder / self.part}.json names {name!r}, which is no file of an index"
                )
        return names

    def _read(self, record: dict[str, Any], dim: int) -> ApproximateIndex:
        import faiss

        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if self.mmap else 0
        faiss_name, rows_name = self._names(record)
        rows = np.frombuffer((self.folder / rows_name).read_bytes(), "<i8").astype(np.int64)
        index = faiss.read_index(str(self.folder / faiss_name), flags)
        if len(rows) != index.ntotal or index.d != dim or not _ascend(rows, record["upto"]):
            raise StoreError(f"{self.folder / faiss_name} holds other rows than it should")
        self.plan.tune(index)
        return ApproximateIndex(index, rows, int(record["upto"]), self.plan.proposals)


def _ascend(rows: NDArray[np.int64], upto: int) -> bool:
    """Whether these are row numbers below a limit, in the order that an index has them."""
    return len(rows) == 0 or bool(rows[0] >= 0 and rows[-1] < upto and (np.diff(rows) > 0).all())


if os.name == "nt":  # pragma: no cover

    @contextmanager
    def _alone(folder: Path) -> Iterator[bool]:
        yield True  # a directory cannot be locked there

else:
    import fcntl

    @contextmanager
    def _alone(folder: Path) -> Iterator[bool]:
        """Whether no other process or thread writes an index meanwhile."""
        with writing_to(folder, 0):
            handle = os.open(folder, os.O_RDONLY)
        try:
            yield _taken(handle)
        finally:
            os.close(handle)

    def _taken(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)  # there are file systems without locks
        return True


@dataclass(frozen=True)
class Kept:
    """Structures with which a part's rows are searched.

    Attributes:
        exact: Rows that are compared one by one; ``None`` if all are to be read from disk, since there are
            rows enough for an index and none has been made yet.
        index: The index of all others, if there is one.
        due: Whether an index is to be made.
    """

    exact: ExactRows | None
    index: ApproximateIndex | None
    due: bool


class IndexManager:
    """The rows that are compared one by one, and the index of all others, if there is one.

    Without an index all rows are compared. An index is made once there are rows enough to train it, and made
    again when a quarter of its rows have come since, or half of them are masked. That takes long, so that it
    is apart: :meth:`made` may run while others search with the structures that :meth:`refreshed` gives.

    Args:
        dim: Dimension of the vectors.
        plan: Kind of index.
        cache: Its files, if it is kept on disk.
    """

    def __init__(self, dim: int, plan: IndexPlan, cache: IndexCache | None) -> None:
        self._dim, self._plan, self._cache = dim, plan, cache
        self._exact, self._loaded = ExactRows(dim), 0
        self._index: ApproximateIndex | None = None

    def refreshed(self, gather: Gather, masked: NDArray[np.bool_], segments: list[str]) -> Kept:
        """Bring the structures up to date; an index is read from the cache, but never made.

        Args:
            gather: Gives rows' vectors.
            masked: (n,) bool, of all rows.
            segments: Names of the segments they are in.

        Raises:
            StoreError: If rows cannot be read.
        """
        outdated = not self._plan.exact and self._is_outdated(masked)
        if outdated and self._cache is not None:
            self.adopt(self._cache.load(segments, len(masked), self._dim))
            outdated = self._is_outdated(masked)
        if outdated and not self._is_worth_one(masked):
            self._index, self._exact, self._loaded, outdated = None, ExactRows(self._dim), 0, False
        due = outdated and not (self._cache is not None and self._cache.mmap and self._cache.read_only)
        if outdated and self._index is None:
            self._exact, self._loaded = ExactRows(self._dim), 0
            return Kept(None, None, due)
        # A block at a time, which then is not copied.
        step = max(1, BLOCK_NUMBERS // self._dim)
        rows = np.arange(self._loaded, len(masked))
        rows = rows[~masked[rows]]
        exact = self._exact
        for start in range(0, len(rows), step):
            numbers = rows[start : start + step]
            exact = exact.grown(gather(numbers), numbers)
        self._exact, self._loaded = exact.masked_by(masked), len(masked)
        return Kept(self._exact, self._index, due)

    def made(self, gather: Gather, masked: NDArray[np.bool_], segments: list[str]) -> ApproximateIndex:
        """Make an index of rows as they were at some moment, kept on disk if that is wanted.

        Nothing here is changed by it; :meth:`adopt` does that. The arguments are those of :meth:`refreshed`.

        Raises:
            StoreError: If rows cannot be read.
        """
        made = train(self._plan, self._dim, np.flatnonzero(~masked), len(masked), gather)
        if self._cache is None or self._cache.read_only:
            return made
        try:
            saved = self._cache.save(made, segments)
        except StoreError as error:
            warnings.warn(f"the index is not kept on disk: {error}", stacklevel=2)
            return made
        mapped = self._cache.load(segments, len(masked), self._dim) if saved and self._cache.mmap else None
        return mapped or made

    def adopt(self, index: ApproximateIndex | None) -> None:
        """Search with an index from now on; rows that have come since it was made are compared as well."""
        if index is not None:
            self._index = index
            self._exact, self._loaded = ExactRows(self._dim), index.upto

    def _is_worth_one(self, masked: NDArray[np.bool_]) -> bool:
        """Whether there are rows enough to train an index; a part that is backfilled has ever fewer."""
        return int((~masked).sum()) >= self._plan.fewest_rows(self._dim)

    def _is_outdated(self, masked: NDArray[np.bool_]) -> bool:
        if self._index is None:
            return self._is_worth_one(masked)
        tail, indexed = len(masked) - self._index.upto, len(self._index.rows)
        return tail > max(LEAST_TAIL, indexed // 4) or 2 * int(masked[self._index.rows].sum()) > indexed
