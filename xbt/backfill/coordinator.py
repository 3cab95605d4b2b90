"""The main process's part of a backfill: the index, the order, the records and the stopping rules."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from xbt.backfill.config import BackfillConfig
from xbt.backfill.embed import Embedded
from xbt.backfill.items import ItemsById
from xbt.backfill.measure import NEXT, CurveLog, CurvePoint
from xbt.backfill.merge_file import MERGE, is_merge_of, load_merge, save_merge
from xbt.backfill.plan import Chunk, cut, draw_plan, fit_support_merge, kept_plan
from xbt.backfill.queries import Models, as_questions, embed_support, load_models, load_questions
from xbt.backfill.records import CURVE, ORDER, REJECTED, RESULT, JsonLines
from xbt.embedding.checks import require_free_space
from xbt.encoders import DualEncoder
from xbt.errors import DataError
from xbt.index import Gallery
from xbt.index.mixed import Merge, RankMerge
from xbt.index.target import (
    backfill_present,
    begin,
    fingerprints,
    fraction_backfilled,
    is_complete,
    open_gallery,
    pending,
    vector_names,
)
from xbt.run_dir import RunDirectory
from xbt.space import EmbeddingSpace
from xbt.store.lock import WriterLock


@dataclass(frozen=True)
class BackfillResult:
    """The state of a backfill at the end of a run.

    Attributes:
        items: Items that this run has moved into the new space.
        rejected: Items that could not be embedded, in all runs; they stay in the old space.
        fraction: Share of the gallery's items that are in the new space.
        position: Items of the order that were taken up, in all runs.
        total: Items of the order.
        why: Reason for the end of the run.
        curve: Recall as it was measured, in all runs.
        stopping_position: Position from which a thousand more items no longer paid, if it was reached.
    """

    items: int
    rejected: int
    fraction: float
    position: int
    total: int
    why: str
    curve: tuple[CurvePoint, ...]
    stopping_position: int | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with the last point of the curve, which has a file of its own."""
        curve = [{"position": point.position, "mean": point.mean} for point in self.curve[-1:]]
        return {**vars(self), "curve": curve}

    def __str__(self) -> str:
        lines = [
            f"backfilled {self.items} items; {self.position} of the order's {self.total} are taken up and "
            f"{self.rejected} rejected; {100 * self.fraction:.1f} % of the gallery is in the new space",
            f"ended because {self.why}",
        ]
        if self.curve:
            last = self.curve[-1]
            low, high = (100 * end for end in last.interval)
            lines.append(f"mean of R@1, R@5 and R@10: {100 * last.mean:.1f} % [{low:.1f}, {high:.1f}]")
        if self.stopping_position is not None:
            lines.append(
                f"stopping point: from item {self.stopping_position} on, the next {NEXT} or more gained no "
                "more than the standard error of their gain"
            )
        return "\n".join(lines)


class BackfillCoordinator:
    """Coordinates a backfill; only used in the main process.

    Args:
        config: Settings of the job.
        run: The job's directory.
        encoder: The new encoder.
        items: The images.
    """

    def __init__(
        self, config: BackfillConfig, run: RunDirectory, encoder: DualEncoder, items: ItemsById
    ) -> None:
        self._config, self._run, self._encoder, self._items = config, run, encoder, items
        self._lock = WriterLock(run.path)
        self._gallery: Gallery
        self._names: tuple[str, str]
        self._merge: Merge = RankMerge()
        self._order: list[str] = []
        self._fingerprints: dict[str, int] = {}
        self._position = self._moved = 0
        self._began = self._earlier = 0.0
        self._why: str | None = None

    def prepare(self) -> list[Chunk]:
        """Open everything, draw or read the order, and measure the gallery as it is.

        Returns:
            The chunks to embed, most urgent first.

        Raises:
            XbtError: If a setting, the gallery, the pairs or a model cannot be used.
        """
        path = self._run.path
        gallery = self._gallery = open_gallery(self._config.gallery, self._config.store)
        self._names = vector_names(gallery)
        complete = is_complete(gallery, self._encoder.space)
        if complete and not (path / ORDER).is_file():
            raise DataError(
                f"the gallery {gallery.path} is of the space of {self._encoder.name} already, so there is "
                "nothing to backfill; give the encoder that will replace the one it was made with"
            )
        self._require_images()
        self._lock.acquire()
        if self._config.overwrite:
            for name in (ORDER, CURVE, REJECTED, RESULT):
                (path / name).unlink(missing_ok=True)
        self._curve, self._rejected = CurveLog(path / CURVE), JsonLines(path / REJECTED, {"id": str})
        self._began = time.monotonic()
        if complete:
            self._order = kept_plan(path / ORDER, []) or []
            self._position = len(self._order)
            return []
        self._prepare_order()
        return self._prepare_chunks()

    def commit(self, chunk: Chunk, done: Embedded) -> str | None:
        """Write a chunk to the gallery and, when it is time, update the index and measure.

        Args:
            chunk: The chunk.
            done: Its vectors and rejections.

        Returns:
            The reason to end the job now; ``None`` to go on.

        Raises:
            StoreError: If the gallery or the records cannot be written.
        """
        # The record comes first: a kill in between leaves an item that is searched as before.
        self._rejected.append(
            [{"id": chunk.ids[place], "reason": reason} for place, reason in done.rejected.items()]
        )
        ids = [chunk.ids[place] for place in done.places]
        self._moved += backfill_present(self._gallery, done.vectors, ids, self._names, self._fingerprints)
        self._position = chunk.end
        if self._position % self._config.evaluate_every == 0:
            self._gallery.prepare_index()
            self._measure()
        self._why = self._reason_to_stop()
        return self._why

    def finish(self) -> BackfillResult:
        """Measure the final state of the gallery and write ``result.json``.

        Raises:
            StoreError: If the gallery cannot be read any more.
        """
        self._gallery.prepare_index()
        self._measure()
        if self._why is None and self._position < len(self._order):
            self._why = f"max_items {self._config.max_items} are taken up"
        result = BackfillResult(
            items=self._moved,
            rejected=len(self._rejected.entries),
            fraction=fraction_backfilled(self._gallery),
            position=self._position,
            total=len(self._order),
            why=self._why or "nothing is left to do",
            curve=tuple(self._curve.points),
            stopping_position=self._curve.stopping_position(),
        )
        self._run.write_json(RESULT, result.to_dict())
        return result

    def close(self) -> None:
        """Close the gallery and release the directory."""
        if hasattr(self, "_gallery"):
            self._gallery.close()
        self._lock.release()

    def _reason_to_stop(self) -> str | None:
        config, points = self._config, self._curve.points
        if config.max_hours is not None and time.monotonic() - self._began >= 3600 * config.max_hours:
            return f"max_hours {config.max_hours:g} have passed"
        if config.recall_target is not None and points and points[-1].mean >= config.recall_target:
            return f"recall_target {config.recall_target:g} is reached"
        gain = self._curve.last_gain() if config.stop_when_flat else None
        if gain is not None and not gain.pays:
            return (
                f"the last {gain.items} items gained {100 * gain.gain:+.2f} points of recall, no more than "
                f"the standard error of {100 * gain.standard_error:.2f}"
            )
        return None

    def _require_images(self) -> None:
        ids = [name for batch in self._gallery.scan() for name in batch.ids]
        if ids and not any(name in self._items for name in ids):
            raise DataError(
                f"none of the {len(ids)} items of the gallery {self._gallery.path}, first {ids[0]!r}, is "
                f"among the {len(self._items)} images of {self._items.name}; give the images that it was "
                "made of, read in the same way"
            )

    def _prepare_order(self) -> None:
        """Read the order and the merge, or make them; the gallery has a new vector afterwards."""
        config, gallery, path = self._config, self._gallery, self._run.path
        assert gallery.path is not None
        ids = {name for batch in gallery.scan() for name in batch.ids}
        old_space = gallery.info().vectors[self._names[0]].space
        evaluation = load_questions(config, ids)
        models = load_models(config, self._encoder)
        _require_old_space(models, old_space)
        left = pending(gallery, self._names[1])
        require_free_space(gallery.path, len(left), self._encoder.dim, "float16")
        if evaluation is not None:
            self._curve.questions = as_questions(evaluation, models)
        order = kept_plan(path / ORDER, left)
        support, spaces = None, (old_space, self._encoder.space)
        if config.support is not None and (order is None or not is_merge_of(gallery.path, *spaces)):
            support = embed_support(config, models, gallery, self._names[0], ids)
            self._merge = fit_support_merge(support, config.seed)
            save_merge(gallery.path, self._merge, *spaces)
        elif (gallery.path / MERGE).is_file():
            self._merge = load_merge(gallery.path, *spaces)
        self._run.prepare()
        if order is None:
            order = draw_plan(
                path / ORDER, config, gallery, self._names[0], left, models, support, self._merge
            )
        self._order = order
        begin(gallery, self._names[1], self._encoder.space)

    def _prepare_chunks(self) -> list[Chunk]:
        left = pending(self._gallery, self._names[1])
        self._fingerprints = fingerprints(self._gallery, left, self._names[0])
        rejected = {entry["id"] for entry in self._rejected.entries}
        self._position, chunks = cut(self._order, set(left) - rejected, self._config)
        self._earlier, self._began = self._curve.seconds, time.monotonic()
        if not self._curve.points or self._position % self._config.evaluate_every == 0:
            self._measure()
        self._why = self._reason_to_stop()
        return chunks if self._why is None else []

    def _measure(self) -> None:
        seconds = self._earlier + time.monotonic() - self._began
        self._curve.measure(self._gallery, self._merge, self._position, seconds)


def _require_old_space(models: Models, space: EmbeddingSpace | None) -> None:
    for encoder in filter(None, (models.old, models.query_encoder)):
        if space is not None:
            space.require(encoder.space, f"the encoder {encoder.name}, which makes old queries,")
