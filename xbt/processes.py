"""Processes of one job: start, shared failure, waiting, and the end of the process group.

Importing this module costs neither torch nor accelerate: the command line needs it before it reads a flag.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from xbt.errors import DataError, XbtError
from xbt.files import writing_to

if TYPE_CHECKING:
    from accelerate import PartialState

Result = TypeVar("Result")
_POLL_SECONDS = 0.2
_MAX_POLL_SECONDS = 5.0
_DONE_PREFIX = ".done_"

_LEAVE_TIMEOUT = 10.0
"""Seconds after which the process group is abandoned: another process may have died."""
_GLOO_DELAY = 0.3
"""Seconds after which gloo's threads have dropped the last collective."""


def is_main_process() -> bool:
    """True in the only process of a run, or in the process of rank 0."""
    return os.environ.get("RANK", "0") == "0"


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, in the main process only; assign it to ``warnings.showwarning``."""
    if is_main_process():
        print(f"warning: {message}", file=file or sys.stderr)


def start_processes() -> PartialState:
    """Join the processes of ``accelerate launch`` or ``torchrun``; without a launcher there is only one."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def leave_processes() -> None:
    """End the process group; gloo's threads would otherwise abort the other processes at exit."""
    torch = sys.modules.get(
        "torch"
    )  # a command that never imported torch has no group, and must not import it
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return

    def leave() -> None:
        # A thread of gloo needs the GIL to drop a collective. Older versions of torch join that thread while
        # they hold the GIL.
        time.sleep(_GLOO_DELAY)
        torch.distributed.destroy_process_group()

    # Older versions of torch wait forever for a process that has exited.
    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(_LEAVE_TIMEOUT)


def cores_per_process(state: PartialState) -> int:
    """CPU cores of this machine per local process, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or state.num_processes
    return max(1, cores // local_processes)


class Team:
    """The processes of one job, which work without waiting for each other and fail together.

    An error in one process ends the others with the same message. Otherwise they would wait for it.

    Args:
        state: The processes.
        directory: The job's directory, on a file system that all processes see.
    """

    def __init__(self, state: PartialState, directory: Path) -> None:
        self.state = state
        self.count, self.rank, self.is_main = state.num_processes, state.process_index, state.is_main_process
        self._alarm = directory / ".stopped"
        self._done_files = [directory / f"{_DONE_PREFIX}{rank}" for rank in range(state.num_processes)]

    def together(self, step: Callable[[], Result]) -> Result:
        """Run a short step in every process; if it fails in one, it fails in all.

        Raises:
            Exception: This process's own failure.
            XbtError: The first failure of another process.
        """
        failure: Exception | None = None
        try:
            result = step()
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
        messages: list[str | None] = [None]
        if self.count > 1:
            from accelerate.utils import gather_object

            messages = gather_object([_message(failure)])
        if failure is not None:
            raise failure
        if any(messages):
            raise DataError(next(message for message in messages if message))
        return result

    def main_alone(self, step: Callable[[], Result]) -> Result:
        """Run a step in the main process and return its picklable result in every process."""
        results: list[Any] = [self.together(lambda: step() if self.is_main else None)]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            results = broadcast_object_list(results)
        result: Result = results[0]
        return result

    def clear(self) -> None:
        """Remove the signal files of this run and of earlier ones; only the main process calls this."""
        for path in (self._alarm, *self._alarm.parent.glob(f"{_DONE_PREFIX}*")):
            path.unlink(missing_ok=True)

    @property
    def stopped(self) -> bool:
        """True once another process has failed; cheap enough to check in a loop."""
        return self.count > 1 and self._alarm.exists()

    @contextmanager
    def alarming(self) -> Iterator[None]:
        """Signal the other processes if the body fails in this one."""
        try:
            yield
        except Exception:
            if self.count > 1:
                with suppress(OSError):  # a full disk still accepts an empty file; a lost disk does not
                    self._alarm.touch()
            raise

    def wait(self) -> None:
        """Report this process as done, and wait until all are done or one has failed.

        It polls one file per process. The process group has time limits for short steps, but shares of the
        work may differ by hours.

        Raises:
            StoreError: If the directory cannot be written.
        """
        if self.count == 1:
            return
        with writing_to(self._done_files[self.rank], 0):
            self._done_files[self.rank].touch()
        pause = _POLL_SECONDS
        while not self.stopped and not all(file.exists() for file in self._done_files):
            time.sleep(pause)
            pause = min(1.2 * pause, _MAX_POLL_SECONDS)


def _message(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    rank = os.environ.get("RANK", "0")
    return str(failure) if isinstance(failure, XbtError) else f"process {rank} failed: {failure!r}"
