"""Jobs that run ahead of the model, in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from xbt.errors import ConfigError, DataError, XbtError

Task = TypeVar("Task")
Result = TypeVar("Result")

_PARALLEL_TOKENIZERS = "TOKENIZERS_PARALLELISM"


def run_ahead(
    job: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    look_ahead: int = 2,
    pin_memory: bool = False,
) -> Iterator[Result]:
    """Does tasks in worker processes and gives their results in order.

    The workers run while the caller deals with a result. They end when the iterator is exhausted or closed.

    Args:
        job: A picklable function; torch runs on one thread within it.
        tasks: Consumed in the calling process, at most ``look_ahead * num_workers`` tasks ahead. An exception
            it raises comes out after the results of the tasks before it.
        num_workers: Worker processes; with 0 the job runs in this process, with the same result.
        look_ahead: Tasks per worker that may be under way or waiting to be fetched.
        pin_memory: Whether tensors among the results are to lie in page-locked memory.

    Yields:
        One result per task.

    Raises:
        ConfigError: If ``num_workers`` is negative.
        DataError: If a worker process dies. Errors of xbt that the job raises come out as they are.
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
        generator=torch.Generator(),  # otherwise every pass would move the caller's random state
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
                f"one of the {num_workers} worker processes died, probably for want of memory or of shared "
                "memory (/dev/shm); run again with fewer workers"
            ) from error
        if isinstance(result, XbtError):
            raise result
        yield result
    if feed.failure is not None:
        raise feed.failure


class _Feed:
    """Takes the place of the loader's sampler: what it yields is sent to the workers."""

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._tasks = tasks
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        try:
            for task in self._tasks:
                yield [task]
        except Exception as error:  # kept until the tasks under way have come back
            self.failure = error


class _Job(Dataset[Any]):
    def __init__(self, job: Callable[[Any], Any]) -> None:
        self._job = job

    def __getitems__(self, tasks: list[Any]) -> Any:
        try:
            with one_thread():
                return self._job(tasks[0])
        except XbtError as error:  # returned, because the loader would put its traceback into the message
            return error


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process deals with it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _all_but_a_lost_reader


def _all_but_a_lost_reader(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # A worker hands tensors over in a thread of its own, which shows what befell it through this hook. That
    # the main process broke off while it fetched one is no news: it says itself that it was interrupted.
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _unchanged(result: Any) -> Any:
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's own operations.

    A single image is too little to be shared out: on a busy machine, waiting for the second thread takes
    twenty times as long as the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_fork(num_workers: int) -> Iterator[None]:
    """Keeps a tokenizer that was used before from warning, in every worker, that it was forked."""
    if not num_workers or _PARALLEL_TOKENIZERS in os.environ:
        yield
        return
    os.environ[_PARALLEL_TOKENIZERS] = "false"
    try:
        yield
    finally:
        del os.environ[_PARALLEL_TOKENIZERS]
