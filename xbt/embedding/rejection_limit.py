"""How much a job may reject before it stops: a source that fails as a whole is not an image that fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xbt.errors import DataError

_LEAST = 100  # items from which on a share means something


@dataclass
class RejectionLimit:
    """Counts entries, and stops the job when too large a share of them was rejected.

    Attributes:
        share: The share that may be rejected; ``None`` is no limit.
        streams: Whether the source is made of streams, whose items cannot be tried again.
        entries: Entries so far.
        rejected: Those that were rejected.
    """

    share: float | None
    streams: bool
    entries: int = 0
    rejected: int = 0

    def add(self, entries: int, rejected: Sequence[tuple[str, str]]) -> None:
        """Counts some entries, of which these (id, reason) were rejected.

        Raises:
            DataError: If that is too much.
        """
        self.entries += entries
        self.rejected += len(rejected)
        if rejected:
            self.require(f"the last is {rejected[-1][0]}: {rejected[-1][1]}")

    def require(self, why: str) -> None:
        """Compares what was counted with the limit.

        Args:
            why: What is known of the reasons.

        Raises:
            DataError: If too large a share of at least 100 entries was rejected.
        """
        if self.share is None or self.entries < _LEAST or self.rejected <= self.share * self.entries:
            return
        again = (
            "start afresh with --overwrite true" if self.streams else "continue with --retry_rejected true"
        )
        raise DataError(
            f"{self.rejected} of {self.entries} items were rejected ({why}), more than the share "
            f"{self.share:g} of --max_rejected; fix the source and {again}, or raise --max_rejected"
        )
