"""Bringing vectors from the device to the CPU without making the device wait."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Label = TypeVar("Label")


class HostCopy:
    """Vectors on their way to the CPU.

    On CUDA the copy is queued behind the computation at once, so that the next batch can be queued behind
    both; elsewhere nothing happens until :meth:`wait`.

    Args:
        vectors: (n, dim) on any device.
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
        """Whether the copy goes on by itself, so that there is something to gain by waiting later."""
        return self._done is not None

    def wait(self) -> Tensor:
        """The vectors as a float32 CPU tensor in ordinary memory."""
        if self._done is None:
            return self._vectors.cpu()
        self._done.synchronize()
        return self._vectors.clone()


def received(copies: Iterable[tuple[Label, HostCopy]]) -> Iterator[tuple[Label, Tensor]]:
    """Waits for copies one behind: the device already has the next batch when the last one is fetched.

    Args:
        copies: Labelled copies; taking the next one queues its computation.

    Yields:
        Every label with its vectors on the CPU, in order. An exception of ``copies`` comes out after what
        was computed before it.
    """
    before: tuple[Label, HostCopy] | None = None
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
        if before is not None:
            yield before[0], before[1].wait()
        before = latest if latest[1].under_way else None
        if before is None:
            yield latest[0], latest[1].wait()
    if before is not None:
        yield before[0], before[1].wait()
    if failure is not None:
        raise failure
