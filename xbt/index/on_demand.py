"""Embedding on demand: rows get their new vector when they are first asked for, once, and durably."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xbt.errors import ConfigError, DataError, ImageError
from xbt.images import ListedPath, load_image
from xbt.index.gallery import Gallery
from xbt.index.protocol import VectorIndex
from xbt.index.target import backfill_present, fingerprints_of
from xbt.space import EmbeddingSpace

Modality = Literal["image", "text"]
Source = Callable[[str], Any] | Mapping[str, Any] | str | os.PathLike[str]
"""Finds originals by id: a function, a mapping, or a folder in which the ids are names of files."""


class MissingOriginal(DataError):
    """An original that does not exist."""


class UnavailableOriginal(DataError):
    """An original that cannot be read now, through no fault of its own: a network or a disk fails."""


class Originals:
    """Reads the originals of rows by id, with the limits of :func:`~xbt.images.read_image`.

    Args:
        source: A function from an id to a path, a PIL image, the bytes of an encoded image, or a text;
            ``None`` or a ``KeyError`` says that there is none. Or a mapping of these by id, such as
            :class:`~xbt.backfill.embed.ItemsById`. Or a folder, which no id may leave.
        modality: ``"image"``, or ``"text"`` for an index of texts.

    Raises:
        ConfigError: If the source or the modality is something else.
    """

    def __init__(self, source: Source, modality: Modality = "image") -> None:
        if modality not in ("image", "text"):
            raise ConfigError(f"modality is {modality!r}; use 'image' or 'text'")
        self.modality = modality
        self._find = _finder(source, modality)

    def read(self, item: str) -> Image.Image | str:
        """Read one original completely: an RGB image, or a text.

        Raises:
            MissingOriginal, ImageError, UnavailableOriginal: If there is none, it cannot be decoded (or is no
                text although texts are needed), or the source fails.
        """
        try:
            found = self._find(item)
        except (LookupError, FileNotFoundError):
            found = None
        except Exception as error:
            raise UnavailableOriginal(f"the original of {item!r} cannot be read: {error}") from error
        if found is None:
            raise MissingOriginal(f"there is no original of {item!r}; add it, or remove the item")
        if self.modality == "text":
            if isinstance(found, str) and found.strip():
                return found
            raise ImageError(f"the original of {item!r} is {found!r:.40}; give a text that is not blank")
        try:
            return load_image(found, None if isinstance(found, str | os.PathLike) else f"of {item!r}")
        except ImageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise MissingOriginal(str(error)) from error
            raise
        except DataError as error:  # the system is at fault
            raise UnavailableOriginal(str(error)) from error


def _finder(source: Source, modality: Modality) -> Callable[[str], Any]:
    if isinstance(source, str | os.PathLike):
        folder = Path(source).expanduser()
        if modality == "text" or not folder.is_dir():
            raise ConfigError(
                f"originals is {str(source)!r}, which is no folder of images; give one, or a function or "
                "mapping from ids to originals"
            )
        root = str(folder)
        return lambda item: ListedPath(f"{root}/{item}", root)
    if callable(source):
        return source
    if hasattr(source, "__getitem__"):
        return source.__getitem__
    raise ConfigError(
        f"originals is a {type(source).__name__}; give a folder, or a function or mapping from ids to "
        "originals"
    )


Outcome = Literal["stored", "missing", "broken", "late"]


class Embeds(Protocol):
    """An encoder: a :class:`~xbt.encoders.DualEncoder`, or anything with these methods."""

    @property
    def space(self) -> EmbeddingSpace:
        """Space of its vectors."""
        ...

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """(n, dim) vectors of n images."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(n, dim) vectors of n texts."""
        ...


@dataclass(frozen=True)
class CascadeStatistics:
    """Counts of a cascade since it was made.

    Attributes:
        queries: Queries.
        candidates: First-stage candidates within the depth, over all queries.
        hits: Candidates whose new vector was there when the query came.
        missing: Candidates without an original. They keep their place, as those that follow.
        broken: Candidates whose original cannot be decoded.
        late: Candidates that were not ready within the time limit.
        embedded: Originals that were embedded and stored, :meth:`~xbt.index.Cascade.prewarm` included.
    """

    queries: int = 0
    candidates: int = 0
    hits: int = 0
    missing: int = 0
    broken: int = 0
    late: int = 0
    embedded: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the candidates whose new vector was there; 1 before the first query."""
        return self.hits / self.candidates if self.candidates else 1.0

    @property
    def embedded_per_query(self) -> float:
        """Originals embedded per query."""
        return self.embedded / max(self.queries, 1)


@dataclass(eq=False)
class _Task:
    """One row on its way: the searches that wait for it, its outcome, the reader of its original."""

    item: str
    waiting: int = 0
    done: Future[Outcome] = field(default_factory=Future)
    reading: Future[None] | None = None


class Embedder:
    """Embeds the originals of an index's rows in threads and writes the vectors to the index.

    Some threads read and decode originals. One thread embeds whatever is decoded by then, as one batch, and
    writes it to the index. A row is done once its vector is durable. A row that several threads ask for is
    embedded once.

    Attributes:
        stored: Ids that are known to have a new vector.
        failed: Ids whose original is missing or broken; they are not tried again.
        embedded: Number of originals that were embedded.
        pid: Process that the threads belong to.
        closed: Whether the threads have ended.
    """

    def __init__(
        self,
        index: VectorIndex,
        names: tuple[str, str],
        encoder: Embeds,
        originals: Originals,
        workers: int,
        batch_size: int,
    ) -> None:
        self.index, self.names = index, names
        self.stored: set[str] = set()
        self.failed: dict[str, Outcome] = {}
        self.embedded, self.pid, self.closed = 0, os.getpid(), False
        self._encoder, self._originals, self._batch_size = encoder, originals, batch_size
        self._tasks: dict[str, _Task] = {}
        self._lock = threading.Lock()
        self._decoded: SimpleQueue[tuple[_Task, Mapping[str, int], Any]] = SimpleQueue()
        self._space = threading.Semaphore(workers + 2 * batch_size)  # decoded originals in memory
        self._readers = ThreadPoolExecutor(workers, "xbt-originals")
        self._model = ThreadPoolExecutor(1, "xbt-cascade")

    def embed(self, items: Iterable[str], seconds: float | None = None) -> dict[str, Outcome]:
        """Embed rows that have no new vector, the most urgent first, and wait for them.

        Originals that nobody has begun to read within the ``seconds`` are left for a later search; the others
        are stored when they are ready.

        Returns:
            The outcome of each row.
        """
        outcomes: dict[str, Outcome] = {}
        tasks: list[_Task] = []
        with self._lock:
            for item in dict.fromkeys(items):
                known = "stored" if item in self.stored else self.failed.get(item)
                if known is not None:
                    outcomes[item] = known
                    continue
                if item not in self._tasks:
                    self._tasks[item] = _Task(item)
                    self._tasks[item].reading = self._readers.submit(self._read, self._tasks[item])
                self._tasks[item].waiting += 1
                tasks.append(self._tasks[item])
        wait([task.done for task in tasks], seconds)
        with self._lock:
            late = [task for task in tasks if not task.done.done()]
            for task in tasks:
                task.waiting -= 1
            for task in late:
                if not task.waiting and task.reading is not None and task.reading.cancel():
                    del self._tasks[task.item]
        outcomes.update((task.item, "late" if task in late else task.done.result()) for task in tasks)
        return outcomes

    def known(self, present: Iterable[str], absent: Iterable[str]) -> None:
        """Note rows that have a new vector, and rows that have none (any more)."""
        with self._lock:
            self.stored.update(present)
            self.stored.difference_update(absent)

    def retry(self) -> None:
        """Forget which originals are missing or broken."""
        with self._lock:
            self.failed.clear()

    def see_other_writers(self) -> None:
        """Load what other processes have written."""
        if isinstance(self.index, Gallery):
            self.index.reload()

    def close(self) -> None:
        """Wait for the originals that are being embedded, and end the threads."""
        self.closed = True
        self._readers.shutdown(cancel_futures=True)
        self._model.shutdown()

    def _read(self, task: _Task) -> None:
        self._space.acquire()
        try:
            before = fingerprints_of(self.index, [task.item], self.names[0])
            self._decoded.put((task, before, self._originals.read(task.item)))
            self._model.submit(self._embed_decoded)
            return
        except MissingOriginal:
            self._finish(task, "missing")
        except ImageError:
            self._finish(task, "broken")
        except DataError:  # the original cannot be read now, or the row is gone
            self._finish(task, "missing", remember=False)
        except Exception as error:
            self._finish(task, error)
        self._space.release()

    def _embed_decoded(self) -> None:
        batch: list[tuple[_Task, Mapping[str, int], Any]] = []
        with suppress(Empty):
            while len(batch) < self._batch_size:
                batch.append(self._decoded.get_nowait())
        if not batch:
            return
        try:
            self._store(batch)
        except Exception as error:
            for task, _, _ in batch:
                self._finish(task, error)
        finally:
            self._space.release(len(batch))

    def _store(self, batch: Sequence[tuple[_Task, Mapping[str, int], Any]]) -> None:
        try:
            texts = self._originals.modality == "text"
            encode = self._encoder.encode_texts if texts else self._encoder.encode_images
            rows = np.asarray(encode([original for _, _, original in batch]), np.float32)
        except ImageError:
            if len(batch) > 1:  # one of them cannot be preprocessed
                for one in batch:
                    self._store([one])
                return
            self._finish(batch[0][0], "broken")
            return
        before = {item: hashed for _, known, _ in batch for item, hashed in known.items()}
        backfill_present(self.index, rows, [task.item for task, _, _ in batch], self.names, before)
        for task, _, _ in batch:
            self._finish(task, "stored")

    def _finish(self, task: _Task, outcome: Outcome | Exception, remember: bool = True) -> None:
        with self._lock:
            if task.done.done():
                return
            if outcome == "stored":
                self.stored.add(task.item)
                self.embedded += 1
            elif not isinstance(outcome, Exception) and remember:
                self.failed[task.item] = outcome
            self._tasks.pop(task.item, None)
        if isinstance(outcome, Exception):
            task.done.set_exception(outcome)
        else:
            task.done.set_result(outcome)


def fetch_present(index: VectorIndex, ids: Sequence[str], name: str) -> dict[str, NDArray[np.float32]]:
    """Read the vectors of those rows that have one, as (dim,) float32 by id.

    All of the rows should have the vector: the others are looked for by halving.
    """
    if not ids:
        return {}
    try:
        return dict(zip(ids, index.fetch(ids, name), strict=True))
    except DataError:
        if len(ids) == 1:
            return {}
    half = len(ids) // 2
    return fetch_present(index, ids[:half], name) | fetch_present(index, ids[half:], name)
