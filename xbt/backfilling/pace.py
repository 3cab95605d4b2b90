"""How fast a job may go."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Waits where a job would be faster than it may.

    Time that was spent otherwise is not made up for by a burst.

    Args:
        per_second: Items per second; ``None`` never waits.
        clock: Seconds, from whenever.
        sleep: Waits so many seconds.

    Example:
        >>> pace = Pace(100)
        >>> for batch in batches:
        ...     encode(batch)
        ...     pace.wait(len(batch))
    """

    def __init__(
        self,
        per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._per_second, self._clock, self._sleep = per_second, clock, sleep
        self._free_at = clock()

    def wait(self, items: int) -> None:
        """Waits until so many items may have been done since the last call."""
        if self._per_second is None:
            return
        now = self._clock()
        # From the later of the two on: an hour in which nothing was done is no credit.
        self._free_at = max(self._free_at + items / self._per_second, now)
        if self._free_at > now:
            self._sleep(self._free_at - now)
