"""Approximate FAISS indexes: kinds, training, files and updates.

FAISS is imported only when the first index is made: torch and faiss-cpu in one process abort on macOS when
both load OpenMP at import.

The files of an index are a cache. They can be rebuilt from the vectors at any time:

    index/<part>.json            indexed segments and file names; written last
    index/<part>-<token>.faiss   file of FAISS
    index/<part>-<token>.rows    row numbers of its entries, int64

Files never change: a new index gets new files, and a process that has mapped the old files keeps them.
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
"""Exact search without an approximate index: every row is compared."""
FOLDER = "index"
ROWS_PER_CENTROID = 39
"""Minimum rows per centroid. FAISS warns below it that k-means has too few, so search stays exact."""
OPQ_CENTROIDS = 256
"""Centroids of the quantiser that FAISS uses to learn the OPQ rotation, for any kind of code."""
COARSE_PROPOSALS = 4
"""Proposals per requested row for an index of compressed vectors."""
TRAINING_ROWS_PER_CENTROID = 256
"""Maximum rows per centroid that FAISS uses in k-means."""
TRAINING_ROWS = 65_536
"""Maximum rows to train anything else, such as a scalar quantiser."""
ROWS_AT_ONCE = 65_536
"""Rows read and added at once."""
MOST_PROPOSED = 16_384
"""Maximum rows to request from an index in order to find enough unmasked ones."""
LEAST_TAIL = 10_000
"""Tail of newer rows, searched exactly, up to which an approximate index is never rebuilt."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexPlan:
    """Kind of index of a gallery.

    Attributes:
        factory: A FAISS ``index_factory`` string such as ``"Flat"``, ``"IVF1024,Flat"``, ``"HNSW32"`` or
            ``"IVF4096,PQ64"``.
        tuning: Search parameters for the FAISS ``ParameterSpace``, such as ``"nprobe=64"`` or
            ``"efSearch=128"``. If empty, an inverted file probes √n of its n lists, and all other parameters
            keep the defaults of FAISS.
    """

    factory: str = EXACT
    tuning: str = ""

    @property
    def exact(self) -> bool:
        """``True`` if every row is compared."""
        return self.factory == EXACT

    @property
    def proposals(self) -> int:
        """Proposals per requested row: more for coarse codes, whose proposals are uncertain."""
        return COARSE_PROPOSALS if re.search("PQ|SQ|LSH|RQ|PCA", self.factory) else 1

    def check(self, dim: int) -> None:
        """Refuse an index that FAISS does not know. ``"Flat"`` does not import FAISS."""
        if not self.exact:
            self.make(dim)
            if re.search(r"\bIDMap2?\b", self.factory):
                raise ConfigError(
                    f"the index {self.factory!r} has its own row numbers, but a gallery numbers the rows "
                    "itself; leave IDMap out"
                )
        elif self.tuning:
            raise ConfigError(
                f"the tuning {self.tuning!r} is for an approximate index, but the index is {EXACT!r}; leave "
                "it out, or choose an index such as 'IVF1024,Flat'"
            )

    def require_inverted_file(self, dim: int) -> None:
        """Refuse an index that cannot be mapped from disk."""
        import faiss

        if self.exact or faiss.try_extract_index_ivf(self.make(dim)) is None:
            raise ConfigError(
                f"the index {self.factory!r} cannot be mapped, since it is not an inverted file; leave mmap "
                "out, or make the gallery with an index such as 'IVF1024,Flat'"
            )

    def make(self, dim: int) -> Any:
        """Make an empty index."""
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
        """Set the search parameters of an index."""
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
        """Compute the minimum number of rows to train the index. Fewer rows are searched exactly."""
        index = self.make(dim)
        centroids = max(_largest_codebook(index), OPQ_CENTROIDS if "OPQ" in self.factory else 1)
        return 1 if index.is_trained else max(dim, ROWS_PER_CENTROID * centroids)


def _largest_codebook(index: Any) -> int:
    """Count the centroids of the largest codebook learned by k-means; 1 if there is none."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    most = 1 if ivf is None else int(ivf.nlist)
    inner = index if ivf is None else ivf
    while isinstance(inner, faiss.IndexPreTransform | faiss.IndexRefine):
        inner = faiss.downcast_index(inner.index if hasattr(inner, "index") else inner.base_index)
    quantiser = getattr(faiss.downcast_index(inner), "pq", None)
    return most if quantiser is None else max(most, int(quantiser.ksub))


def _said(error: RuntimeError) -> str:
    """Strip the source location from a FAISS message."""
    return str(error).rstrip().rsplit(": ", maxsplit=1)[-1]


@dataclass(frozen=True)
class ApproximateIndex:
    """Index of some rows of a part. It is immutable, so many threads may search it.

    ``rows`` (n,) are the row numbers of its entries, ascending and below ``upto``, the number of rows of the
    part when it was made. ``proposals`` are made per requested row.
    """

    index: Any
    rows: NDArray[np.int64]
    upto: int
    proposals: int = 1

    def propose(
        self, queries: NDArray[np.float32], wanted: int, masked: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Propose the unmasked rows that are likely to score best.

        Returns:
            (n, wanted) unique row numbers in the order of the index, padded with
            :data:`~xbt.index.exact_search.MISSING` if it finds fewer.
        """
        fetched = min(wanted, len(self.rows))
        while True:
            _, places = self.index.search(queries, fetched)
            known = (places >= 0) & (places < len(self.rows))
            rows = np.where(known, self.rows[np.where(known, places, 0)], MISSING)
            rows[(rows >= 0) & masked[rows]] = MISSING
            enough = (rows >= 0).sum(axis=1) >= wanted
            # An inverted file that returns fewer rows than requested has no more in the lists it probes.
            if fetched >= min(len(self.rows), MOST_PROPOSED) or (enough | (places[:, -1] < 0)).all():
                break
            fetched = min(4 * fetched, len(self.rows), MOST_PROPOSED)
        order = np.argsort(rows < 0, axis=1, kind="stable")[:, :wanted]
        proposed: NDArray[np.int64] = np.take_along_axis(rows, order, axis=1)
        return proposed


def train(plan: IndexPlan, dim: int, rows: NDArray[np.int64], upto: int, gather: Gather) -> ApproximateIndex:
    """Make an index of ascending row numbers below ``upto``, trained on an evenly spaced sample of them."""
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
    """Files of the index of one part in the folder ``index/`` of the gallery.

    ``segments_now`` reads the current segment names of the part from disk.
    """

    folder: Path
    part: str
    plan: IndexPlan
    segments_now: Callable[[], list[str]]
    mmap: bool = False
    read_only: bool = False

    def load(self, segments: list[str], count: int, dim: int) -> ApproximateIndex | None:
        """Read the index of ``count`` rows of these segments.

        ``None`` if it is missing, damaged, of another kind or of other rows; it can be made again.
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
        # An altered file can make FAISS raise almost anything. The index is only a cache: make it again.
        except (XbtError, LookupError, TypeError, AttributeError, OSError, ValueError, ArithmeticError,
                RuntimeError, MemoryError) as error:  # fmt: skip
            _log.warning("the index in %s is made again: %s", self.folder, error)
            return None

    def save(self, made: ApproximateIndex, segments: list[str]) -> bool:
        """Write an index, and remove the files of the previous one; return whether it was written.

        A search makes a missing index without holding the write lock of the gallery. The index is therefore
        discarded if another process is writing one, if its rows are outdated, or if a newer index exists.
        """
        if self.folder.is_symlink():
            raise StoreError(
                f"{self.folder} is a link, and links are not followed; replace it with a directory"
            )
        with writing_to(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder) as alone:
            if not alone or not self._is_wanted(made, segments):
                return False
            self._write(made, segments)
        return True

    def remove(self) -> None:
        """Remove the files of a deleted part."""
        for path in () if self.folder.is_symlink() else self.folder.glob("*"):
            if re.fullmatch(rf"{self.part}(\.json|-[0-9a-f]{{8}}\.(faiss|rows))", path.name):
                path.unlink(missing_ok=True)

    def faults(self) -> list[str]:
        """List damage to the files, one sentence per fault."""
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

            library: Any = faiss  # FAISS does not buffer, and passes its data to the callback
            try:
                library.write_index(made.index, library.PyCallbackIOWriter(write))
            except RuntimeError as error:
                raise (failures[0] if failures else OSError(errno.EIO, _said(error))) from error

        needed = 4 * made.index.d * len(made.rows)  # an estimate: codes take less, and graphs more
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
        """Check that a record has this kind of index and a prefix of these segments."""
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
        """Read the names of both files, and refuse any other name in an untrusted record."""
        names = record["faiss"], record["rows"]
        for name, ending in zip(names, ("faiss", "rows"), strict=True):
            if not re.fullmatch(rf"{self.part}-[0-9a-f]{{8}}\.{ending}", name):
                raise StoreError(f"{self.folder / self.part}.json names {name!r}, which is not an index file")
        return names

    def _read(self, record: dict[str, Any], dim: int) -> ApproximateIndex:
        import faiss

        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if self.mmap else 0
        faiss_name, rows_name = self._names(record)
        rows = np.frombuffer((self.folder / rows_name).read_bytes(), "<i8").astype(np.int64)
        index = faiss.read_index(str(self.folder / faiss_name), flags)
        ascending = not len(rows) or (
            rows[0] >= 0 and rows[-1] < record["upto"] and (np.diff(rows) > 0).all()
        )
        if len(rows) != index.ntotal or index.d != dim or not ascending:
            raise StoreError(f"{self.folder / faiss_name} does not hold the rows on record")
        self.plan.tune(index)
        return ApproximateIndex(index, rows, int(record["upto"]), self.plan.proposals)


if os.name == "nt":  # pragma: no cover

    @contextmanager
    def _alone(folder: Path) -> Iterator[bool]:
        yield True  # Windows cannot lock a directory

else:
    import fcntl

    @contextmanager
    def _alone(folder: Path) -> Iterator[bool]:
        """Yield ``True`` if no other process or thread is writing an index."""
        with writing_to(folder, 0):
            handle = os.open(folder, os.O_RDONLY)
        alone = True
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                alone = error.errno not in (errno.EAGAIN, errno.EACCES)  # some file systems have no locks
            yield alone
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Kept:
    """Search structures of a part: rows to compare exactly, and the index of all others, if there is one.

    ``exact`` is ``None`` to read all rows from disk, if there are enough rows for an index and none has been
    made yet. ``due`` says that an index needs to be made.
    """

    exact: ExactRows | None
    index: ApproximateIndex | None
    due: bool


class IndexManager:
    """Exactly compared rows, and the index of all other rows if there is one.

    Without an index all rows are compared. An index is made once there are enough rows to train it. It is
    made again when the newer rows exceed both :data:`LEAST_TAIL` and a quarter of the indexed rows, or when
    half of the indexed rows are masked. That takes long, so :meth:`made` may run while other threads search
    with the structures from :meth:`refreshed`.
    """

    def __init__(self, dim: int, plan: IndexPlan, cache: IndexCache | None) -> None:
        self._dim, self._plan, self._cache = dim, plan, cache
        self._exact, self._loaded = ExactRows(dim), 0
        self._index: ApproximateIndex | None = None

    def refreshed(self, gather: Gather, masked: NDArray[np.bool_], segments: list[str]) -> Kept:
        """Bring the structures up to date with an (n,) mask of all rows, and the names of their segments.

        An index is read from the cache, but never made.
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
        # Adding whole blocks avoids copies.
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
        """Make an index of a snapshot of the rows, and save it if there is a writable cache.

        This changes no state; call :meth:`adopt` to use the index. Arguments as in :meth:`refreshed`.
        """
        made = train(self._plan, self._dim, np.flatnonzero(~masked), len(masked), gather)
        if self._cache is None or self._cache.read_only:
            return made
        try:
            saved = self._cache.save(made, segments)
        except StoreError as error:
            warnings.warn(f"the index cannot be saved: {error}", stacklevel=2)
            return made
        mapped = self._cache.load(segments, len(masked), self._dim) if saved and self._cache.mmap else None
        return mapped or made

    def adopt(self, index: ApproximateIndex | None) -> None:
        """Use an index in searches from now on. Rows newer than the index are compared exactly."""
        if index is not None:
            self._index = index
            self._exact, self._loaded = ExactRows(self._dim), index.upto

    def _is_worth_one(self, masked: NDArray[np.bool_]) -> bool:
        """Check for enough rows to train an index. The old part shrinks during a backfill."""
        return int((~masked).sum()) >= self._plan.fewest_rows(self._dim)

    def _is_outdated(self, masked: NDArray[np.bool_]) -> bool:
        if self._index is None:
            return self._is_worth_one(masked)
        tail, indexed = len(masked) - self._index.upto, len(self._index.rows)
        return tail > max(LEAST_TAIL, indexed // 4) or 2 * int(masked[self._index.rows].sum()) > indexed
