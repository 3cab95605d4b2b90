"""Processes that work side by side without waiting for each other, and fail together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from xbt.errors import DataError, XbtError
from xbt.files import writing_to

Result = TypeVar("Result")
_POLL_SECONDS = 0.2
_LONGEST_POLL = 5.0
_MARK = ".done_"


def start_processes() -> PartialState:
    """Joins the processes that ``accelerate launch`` or ``torchrun`` started, or is the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class Team:
    """The processes of one job, all of which see its directory.

    What any of them cannot do ends the others too, with the same sentence: a process that gave up alone would
    leave them waiting for it.

    Args:
        state: The processes.
        directory: The job's directory, on a file system that all of them see.
    """

    def __init__(self, state: PartialState, directory: Path) -> None:
        self.state = state
        self.count, self.rank, self.is_main = state.num_processes, state.process_index, state.is_main_process
        self._alarm = directory / ".stopped"
        self._marks = [directory / f"{_MARK}{rank}" for rank in range(state.num_processes)]

    def together(self, step: Callable[[], Result]) -> Result:
        """Runs a short step in every process; if it fails in one, it fails in all.

        Raises:
            Exception: This process's own failure.
            XbtError: The first failure of another process.
        """
        problem: Exception | None = None
        try:
            result = step()
        except Exception as error:
            if self.count == 1:
                raise
            problem = error
        problems = gather_object([_described(problem)]) if self.count > 1 else [None]
        if problem is not None:
            raise problem
        if any(problems):
            raise DataError(next(each for each in problems if each))
        return result

    def main_alone(self, step: Callable[[], Result]) -> Result:
        """Runs a step in the main process and gives every process its result, which must be picklable."""
        found: list[Any] = [self.together(lambda: step() if self.is_main else None)]
        shared: list[Result] = broadcast_object_list(found) if self.count > 1 else found
        return shared[0]

    def clear(self) -> None:
        """Removes what an earlier run or this one left for its processes to see; the main one calls it."""
        for path in (self._alarm, *self._alarm.parent.glob(f"{_MARK}*")):
            path.unlink(missing_ok=True)

    @property
    def stopped(self) -> bool:
        """Whether another process has given up; to be asked often."""
        return self.count > 1 and self._alarm.exists()

    @contextmanager
    def alarming(self) -> Iterator[None]:
        """Tells the others when this process gives up."""
        try:
            yield
        except Exception:
            if self.count > 1:
                with suppress(OSError):  # a full disk still takes an empty file, a lost one none
                    self._alarm.touch()
            raise

    def wait(self) -> None:
        """Says that this process's work is done, and waits until that of all is or one has given up.

        The directory is asked for one file a process, not the process group: its time limits are meant for
        short steps, and shares of the work may differ by hours.

        Raises:
            StoreError: If the directory cannot be written.
        """
        if self.count == 1:
            return
        with writing_to(self._marks[self.rank], 0):
            self._marks[self.rank].touch()
        pause = _POLL_SECONDS
        while not self.stopped and not all(mark.exists() for mark in self._marks):
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_POLL)


def _described(problem: Exception | None) -> str | None:
    if problem is None:
        return None
    rank = os.environ.get("RANK", "0")
    return str(problem) if isinstance(problem, XbtError) else f"process {rank} failed: {problem!r}"


def cores_per_process(state: PartialState) -> int:
    """CPU cores that each process on this machine can have for itself, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or state.num_processes
    return max(1, cores // here)
