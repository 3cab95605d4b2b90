"""The curve of a backfill on disk, and what it says about going on."""

from __future__ import annotations

from pathlib import Path

from xbt.backfilling.curve import CurvePoint, Gain, Questions, gain_at, measure, stopping_position
from xbt.backfilling.records import Lines
from xbt.gallery import Gallery, Merge


class CurveBook:
    """Measures recall and keeps what was measured; without questions it keeps an empty curve.

    Args:
        path: The curve's file.

    Attributes:
        points: Of all runs.
        questions: What to ask the gallery; ``None`` measures nothing.

    Raises:
        DataError: If the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self.points = [CurvePoint.from_dict(entry) for entry in self._lines.entries]
        self.questions: Questions | None = None

    @property
    def seconds(self) -> float:
        """That earlier runs had worked when they measured last."""
        return self.points[-1].seconds if self.points else 0.0

    def measure(self, gallery: Gallery, merge: Merge, position: int, seconds: float) -> None:
        """Adds a point, unless there is one for this position or a later one."""
        if self.questions is None or (self.points and self.points[-1].position >= position):
            return
        point = measure(gallery, self.questions, merge, position, seconds)
        self._lines.append([point.to_dict()])
        self.points.append(point)

    def last_gain(self) -> Gain | None:
        """What the last items have gained, as far as that is known."""
        if self.questions is None or not self.points:
            return None
        return gain_at(self.points, len(self.points) - 1, self.questions.groups)

    def stopping_position(self) -> int | None:
        """See :func:`~xbt.backfilling.curve.stopping_position`."""
        return None if self.questions is None else stopping_position(self.points, self.questions.groups)
