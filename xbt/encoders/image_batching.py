"""Batches of images around the model: decoding ahead in worker processes, and copying vectors to the CPU."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xbt.errors import ConfigError, DataError, EncoderError, ImageError, XbtError
from xbt.images import ImageSource, ReadImage, blame_the_system, read_image

Task = TypeVar("Task")
Result = TypeVar("Result")
Label = TypeVar("Label")

_PARALLEL_TOKENIZERS = "TOKENIZERS_PARALLELISM"

Transform = Callable[[Image.Image], Tensor]
"""From an RGB image to (3, height, width) float32 pixels."""

NamedImage = tuple[ImageSource, str | None]
"""An image and its name in errors; ``None`` for a path, which is its own name."""


class EncodedImages(NamedTuple):
    """The vectors of one batch of images, and the images that were refused or converted.

    Attributes:
        vectors: (m, dim) float32 CPU tensor with unit rows, without a graph.
        kept: The rows' m positions in the batch, ascending.
        rejected: Position → reason, for images that could not be read.
        notes: Position → note on a conversion, such as ``"CMYK converted to RGB"``.
    """

    vectors: Tensor
    kept: list[int]
    rejected: dict[int, str]
    notes: dict[int, str]


class DecodedImages(NamedTuple):
    """The pixels of one batch, (m, 3, height, width) float32; other fields as in :class:`EncodedImages`."""

    pixels: Tensor
    kept: list[int]
    rejected: dict[int, str]
    notes: dict[int, str]


def as_images(images: Sequence[ImageSource]) -> Sequence[ImageSource]:
    """The images as a sequence; a single image, or a Dataset without a correct length, is refused."""
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        raise DataError(f"images must be a list, got a single {type(images).__name__}; write [image]")
    # A sequence is not copied: it may read its images lazily.
    if isinstance(images, Sequence) or not hasattr(images, "__getitem__"):
        return images if isinstance(images, Sequence) else list(images)
    # Iterating over a torch Dataset may never end, so its length is needed.
    if not hasattr(images, "__len__"):
        raise DataError(
            f"images is a {type(images).__name__} without a length; give a list, or define __len__"
        )
    try:
        return [images[row] for row in range(len(images))]
    except IndexError as error:
        raise DataError(
            f"images has the length {len(images)}, but fewer entries; correct its __len__"
        ) from error


def numbered(images: Sequence[ImageSource], batch_size: int) -> Iterator[list[NamedImage]]:
    """Batches of images; those without a path are named by their number."""
    for start in range(0, len(images), batch_size):
        batch: list[NamedImage] = []
        for number in range(start, min(start + batch_size, len(images))):
            source = images[number]
            batch.append((source, None if isinstance(source, str | os.PathLike) else f"number {number}"))
        yield batch


def require_positive(batch_size: int) -> None:
    """Refuse a batch size below 1 with a ConfigError."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but it must be at least 1")


def not_finite(vectors: Tensor) -> list[int]:
    """Rows that hold NaN or infinite values."""
    rows: list[int] = torch.nonzero(~torch.isfinite(vectors).all(dim=1)).flatten().tolist()
    return rows


def decode_batches(
    batches: Iterable[Sequence[NamedImage]],
    transform: Transform,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[DecodedImages]:
    """Read and preprocess batches of images, in order, with :func:`run_ahead`.

    Each result lists images that cannot be read. It is an error if the system rather than an image is at
    fault, or if the preprocessing makes images of different sizes.
    """
    tasks = ([_ready(source, name) for source, name in batch] for batch in batches)
    yield from run_ahead(_Decoder(transform), tasks, num_workers, pin_memory=pin_memory)


_Ready = NamedImage | ReadImage | ImageError


def _ready(source: ImageSource, name: str | None) -> _Ready:
    # A PIL image may be a file that is not read yet. Pickling it for a worker could then fail in a thread
    # whose error is lost, and the loader would wait forever.
    if not isinstance(source, Image.Image):
        return source, name
    try:
        return read_image(source, name)
    except ImageError as error:
        return error


class _Decoder:
    """A worker's job: read and preprocess one batch. It holds no weights."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, batch: list[_Ready]) -> DecodedImages:
        pixels: list[Tensor] = []
        decoded = DecodedImages(torch.zeros(0), [], {}, {})
        for position, item in enumerate(batch):
            try:
                if isinstance(item, ImageError):
                    raise item
                read = item if isinstance(item, ReadImage) else read_image(*item)
                pixels.append(self._preprocess(read.image, item))
            except ImageError as error:
                decoded.rejected[position] = str(error)
                continue
            decoded.kept.append(position)
            if read.note is not None:
                decoded.notes[position] = read.note
        if not pixels:
            return decoded
        sizes = sorted({tuple(image.shape) for image in pixels})
        if len(sizes) > 1:
            raise EncoderError(
                f"the preprocessing makes images of different sizes, {_size(sizes[0])} and "
                f"{_size(sizes[-1])} pixels; make it crop or squash all images to the model's size"
            )
        try:
            return decoded._replace(pixels=torch.stack(pixels))
        except Exception as error:
            blame_the_system(error, f"a batch of {len(pixels)} images")
            raise

    def _preprocess(self, image: Image.Image, item: _Ready) -> Tensor:
        try:
            return self._transform(image)
        except Exception as error:  # one odd image must not end a job of millions
            blame_the_system(error, f"image {_label(item, image)}")
            reason = f"cannot be preprocessed: {type(error).__name__}: {error}"
            raise ImageError(f"image {_label(item, image)} {reason}") from error


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[:0:-1]))


def _label(item: _Ready, image: Image.Image) -> str:
    size = f"of {image.width} x {image.height} pixels"
    if isinstance(item, ReadImage | ImageError):
        return size
    source, name = item
    if name is None and isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return name or size


class HostCopy:
    """An asynchronous copy of vectors to the CPU.

    On CUDA the copy is queued right after the computation, so that the next batch can be queued behind both.
    On other devices the copy happens in :meth:`wait`.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors.float()
        self._done: torch.cuda.Event | None = None
        if self._vectors.is_cuda:
            with torch.cuda.device(self._vectors.device):
                host = torch.empty(self._vectors.shape, pin_memory=True)
                host.copy_(self._vectors, non_blocking=True)
                self._vectors, self._done = host, torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._done.record()

    @property
    def under_way(self) -> bool:
        """True if the copy runs in the background, so that waiting later saves time."""
        return self._done is not None

    def wait(self) -> Tensor:
        """The vectors as a float32 CPU tensor in ordinary memory."""
        if self._done is None:
            return self._vectors.cpu()
        self._done.synchronize()
        return self._vectors.clone()


def wait_for_copies(copies: Iterable[tuple[Label, HostCopy]]) -> Iterator[tuple[Label, Tensor]]:
    """Wait for each copy only after the next batch is queued, so that the device never idles.

    Taking the next of the labelled copies queues its computation. An exception of ``copies`` is raised after
    the results before it.
    """
    previous: tuple[Label, HostCopy] | None = None
    failure: Exception | None = None
    pending = iter(copies)
    while True:
        try:
            latest = next(pending)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        if previous is not None:
            yield previous[0], previous[1].wait()
        previous = latest if latest[1].under_way else None
        if previous is None:
            yield latest[0], latest[1].wait()
    if previous is not None:
        yield previous[0], previous[1].wait()
    if failure is not None:
        raise failure


def run_ahead(
    job: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    look_ahead: int = 2,
    pin_memory: bool = False,
) -> Iterator[Result]:
    """Run a job on tasks in worker processes and yield the results in order.

    The workers run while the caller handles a result. They end when the iterator is exhausted or closed.
    Without workers the job runs in this process, with the same results.

    Args:
        job: A picklable function; torch runs on one thread within it. Its xbt errors are raised unchanged.
        tasks: Consumed in the calling process, at most ``look_ahead * num_workers`` tasks ahead. An exception
            of this iterable is raised after the results of the tasks before it.
        num_workers: Worker processes.
        look_ahead: Tasks per worker that may be running or waiting to be fetched.
        pin_memory: Whether to put tensors of the results into page-locked memory.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}, but it must be at least 0")
    feed = _Feed(tasks)
    loader: DataLoader[Any] = DataLoader(
        _Job(job),
        batch_sampler=feed,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=look_ahead if num_workers else None,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        generator=torch.Generator(),  # else every pass would change the caller's random state
    )
    with _quiet_fork(num_workers):
        results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            break
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise DataError(
                f"one of the {num_workers} worker processes died, probably because memory or shared memory "
                "(/dev/shm) ran out; run again with fewer workers"
            ) from error
        if isinstance(result, XbtError):
            raise result
        yield result
    if feed.failure is not None:
        raise feed.failure


class _Feed:
    """The loader's batch sampler; it yields the tasks themselves, which are sent to the workers."""

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._tasks = tasks
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        try:
            for task in self._tasks:
                yield [task]
        except Exception as error:  # kept until the running tasks have returned
            self.failure = error


class _Job(Dataset[Any]):
    def __init__(self, job: Callable[[Any], Any]) -> None:
        self._job = job

    def __getitems__(self, tasks: list[Any]) -> Any:
        try:
            with one_thread():
                return self._job(tasks[0])
        except XbtError as error:  # returned, because the loader would add its traceback to the message
            return error


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process handles it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _ignore_lost_connections


def _ignore_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # A worker sends tensors from a separate thread, whose errors go through this hook. A broken connection is
    # not shown: then the main process was interrupted, and reports that itself.
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _unchanged(result: Any) -> Any:
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations on one thread within the block.

    A single image is too small to split: on a busy machine, waiting for the second thread takes twenty times
    as long as the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_fork(num_workers: int) -> Iterator[None]:
    """Suppress the warning of a used tokenizer, in every worker, that it was forked."""
    if not num_workers or _PARALLEL_TOKENIZERS in os.environ:
        yield
        return
    os.environ[_PARALLEL_TOKENIZERS] = "false"
    try:
        yield
    finally:
        del os.environ[_PARALLEL_TOKENIZERS]
