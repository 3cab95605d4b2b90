"""The backfill of an index: many processes, one order, resumable, within a budget."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xbt.backfill.config import MAY_CHANGE, BackfillConfig
from xbt.backfill.curve import NEXT, CurveLog, CurvePoint, JsonLines
from xbt.backfill.embed import Embedded, ItemsById, RateLimiter, embed_chunks, gathered
from xbt.backfill.plan import (
    Chunk,
    as_questions,
    cut,
    draw_plan,
    embed_support,
    fit_support_merge,
    kept_plan,
    load_models,
    load_questions,
)
from xbt.backfill.target import (
    MERGE,
    close_target,
    directory_of,
    is_merge_of,
    load_merge,
    open_target,
    refresh,
    require_capacity,
    save_merge,
)
from xbt.data.image_collection import open_images
from xbt.embedding.job import choose_workers, require_writable
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import DataError
from xbt.index.mixed import Merge, RankMerge
from xbt.index.protocol import VectorIndex
from xbt.index.target import backfill_present, begin, fingerprints, is_complete, pending, vector_names
from xbt.processes import Team, cores_per_process, start_processes
from xbt.run_dir import RunDirectory
from xbt.store.lock import WriterLock

ORDER, CURVE, REJECTED, RESULT = "order.json", "curve.jsonl", "rejected.jsonl", "result.json"


@dataclass(frozen=True)
class BackfillResult:
    """The state of a backfill at the end of a run.

    Attributes:
        items: Items that this run has moved into the new space.
        rejected: Items that could not be embedded, in all runs; they stay in the old space.
        fraction: Share of the index's items that are in the new space.
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


def run_backfill(config: BackfillConfig, index: VectorIndex | None = None) -> BackfillResult:
    """Move an index's items into the new encoder's space, the most urgent first.

    Every process that ``accelerate launch`` or ``torchrun`` started calls this. The processes share each
    chunk of the order, and the main process alone writes it to the index, in one step. A job that was
    killed or has spent its budget continues where it stopped when the same command is given again, with any
    number of processes, in the same order. Items that were added to the index in the meantime come last.

    Args:
        config: Settings of the job.
        index: Any index to backfill, such as a :class:`~xbt.index.QdrantIndex`, in place of the one that
            ``config.gallery`` names. It stays open. Only the main process uses it.

    Returns:
        The state of the backfill, in every process; print it.

    Raises:
        XbtError: If a setting, the index, an encoder, the images or the directory cannot be used, or the
            encoder gives NaN. Images that are missing or cannot be decoded are no error: they are listed in
            ``rejected.jsonl``, and their items stay in the old space. Remove the file to try them again.
    """
    path = Path(config.output_dir)
    team = Team(start_processes(), path)
    run = team.together(lambda: RunDirectory(path, config, config.overwrite, MAY_CHANGE))
    items = team.together(lambda: ItemsById(open_images(config.images)))
    team.main_alone(lambda: require_writable(path))
    encoder = team.together(lambda: _load(config, team))
    coordinator = _Coordinator(config, run, encoder, items, index)
    with closing(coordinator):
        chunks = team.main_alone(coordinator.prepare)
        _embed(config, team, encoder, items, coordinator, chunks)
        return team.main_alone(coordinator.finish)


def _embed(
    config: BackfillConfig,
    team: Team,
    encoder: DualEncoder,
    items: ItemsById,
    coordinator: _Coordinator,
    chunks: list[Chunk],
) -> None:
    """Embed chunk after chunk, each process its share, until the coordinator gives a reason to stop."""
    workers = config.num_workers
    if workers is None:
        workers = choose_workers(encoder, cores_per_process(team.state))
    limiter = RateLimiter(config.items_per_second and config.items_per_second / team.count)
    share, ids = (team.rank, team.count), [chunk.ids for chunk in chunks]
    shares = embed_chunks(encoder, items, ids, share, config.batch_size, workers, limiter)
    total = sum(len(chunk.ids) for chunk in chunks)
    bar = tqdm(total=total, desc="backfilling", unit="image", disable=not team.is_main)
    with closing(shares), bar:
        for chunk in chunks:
            done = gathered(team, team.together(lambda: next(shares)))
            why = team.main_alone(partial(coordinator.commit, chunk, done))
            bar.update(len(chunk.ids))
            if why is not None:
                break


def _load(config: BackfillConfig, team: Team) -> DualEncoder:
    encoder = load_encoder(config.encoder, team.state.device)
    encoder.precision = config.precision
    return encoder.compile_towers() if config.compile else encoder


class _Coordinator:
    """The main process's part of a backfill: the index, the order, the records and the stopping rules.

    It opens the index that the config names, unless one is given.
    """

    def __init__(
        self,
        config: BackfillConfig,
        run: RunDirectory,
        encoder: DualEncoder,
        items: ItemsById,
        index: VectorIndex | None,
    ) -> None:
        self._config, self._run, self._encoder, self._items = config, run, encoder, items
        self._lock = WriterLock(run.path)
        self._given, self._opened = index, False
        self._index: VectorIndex
        self._names: tuple[str, str]
        self._merge: Merge = RankMerge()
        self._order: list[str] = []
        self._fingerprints: dict[str, int] = {}
        self._position = self._moved = 0
        self._began = self._earlier = 0.0
        self._why: str | None = None

    def prepare(self) -> list[Chunk]:
        """Open everything, draw or read the order, and measure the index as it is.

        Returns:
            The chunks to embed, most urgent first.
        """
        config, path = self._config, self._run.path
        if self._given is None:
            self._index, self._opened = open_target(config.gallery, config.store), True
        else:
            self._index = self._given
        self._names = vector_names(self._index)
        self._complete = is_complete(self._index, self._encoder.space)
        if self._complete and not (path / ORDER).is_file():
            raise DataError(
                f"the gallery {config.gallery} is of the space of {self._encoder.name} already, so there is "
                "nothing to backfill; give the encoder that will replace the one it was made with"
            )
        ids = [name for batch in self._index.scan() for name in batch.ids]
        if ids and not any(name in self._items for name in ids):
            raise DataError(
                f"none of the {len(ids)} items of the gallery {config.gallery}, first {ids[0]!r}, is "
                f"among the {len(self._items)} images of {self._items.name}; give the images that it was "
                "made of, read in the same way"
            )
        self._lock.acquire()
        if config.overwrite:
            for name in (ORDER, CURVE, REJECTED, RESULT):
                (path / name).unlink(missing_ok=True)
        self._curve, self._rejected = CurveLog(path / CURVE), JsonLines(path / REJECTED, {"id": str})
        self._began = time.monotonic()
        if self._complete:
            self._order = kept_plan(path / ORDER, []) or []
            self._position = len(self._order)
            return []
        self._prepare_order(set(ids))
        self._fingerprints = fingerprints(self._index, *self._names)
        rejected = {entry["id"] for entry in self._rejected.entries}
        self._position, chunks = cut(self._order, self._fingerprints.keys() - rejected, config)
        self._earlier, self._began = self._curve.seconds, time.monotonic()
        if not self._curve.points or self._position % config.evaluate_every == 0:
            self._measure()
        self._why = self._reason_to_stop()
        return chunks if self._why is None else []

    def commit(self, chunk: Chunk, done: Embedded) -> str | None:
        """Write a chunk to the index and, when it is time, update the index and measure.

        Returns:
            The reason to end the job now; ``None`` to go on.
        """
        # The record comes first: a kill in between leaves an item that is searched as before.
        self._rejected.append(
            [{"id": chunk.ids[place], "reason": reason} for place, reason in done.rejected.items()]
        )
        ids = [chunk.ids[place] for place in done.places]
        self._moved += backfill_present(self._index, done.vectors, ids, self._names, self._fingerprints)
        self._position = chunk.end
        if self._position % self._config.evaluate_every == 0:
            refresh(self._index)
            self._measure()
        self._why = self._reason_to_stop()
        return self._why

    def finish(self) -> BackfillResult:
        """Measure the final state of the index and write ``result.json``."""
        refresh(self._index)
        self._measure()
        if self._why is None and self._position < len(self._order):
            self._why = f"max_items {self._config.max_items} are taken up"
        result = BackfillResult(
            items=self._moved,
            rejected=len(self._rejected.entries),
            fraction=1.0 if self._complete else self._index.info().fraction_backfilled,
            position=self._position,
            total=len(self._order),
            why=self._why or "nothing is left to do",
            curve=tuple(self._curve.points),
            stopping_position=self._curve.stopping_position(),
        )
        self._run.write_json(RESULT, result.to_dict())
        return result

    def close(self) -> None:
        """Close the index, unless the caller gave it, and release the directory."""
        if self._opened:
            close_target(self._index)
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

    def _prepare_order(self, ids: set[str]) -> None:
        """Read the order and the merge, or make them; the index has a new vector afterwards."""
        config, index, path = self._config, self._index, self._run.path
        merge_dir = directory_of(index) or path
        old, new = self._names
        old_space = index.info().vectors[old].space
        evaluation = load_questions(config, ids)
        models = load_models(config, self._encoder)
        for encoder in filter(None, (models.old, models.query_encoder)):
            if old_space is not None:
                old_space.require(encoder.space, f"the encoder {encoder.name}, which makes old queries,")
        left = pending(index, new)
        require_capacity(index, len(left), self._encoder.dim)
        if evaluation is not None:
            self._curve.questions = as_questions(evaluation, models)
        order = kept_plan(path / ORDER, left)
        support, spaces = None, (old_space, self._encoder.space)
        if config.support is not None and (order is None or not is_merge_of(merge_dir, *spaces)):
            support = embed_support(config, models, index, old, ids)
            self._merge = fit_support_merge(support, config.seed)
            save_merge(merge_dir, self._merge, *spaces)
        elif (merge_dir / MERGE).is_file():
            self._merge = load_merge(merge_dir, *spaces)
        self._run.prepare()
        if order is None:
            order = draw_plan(path / ORDER, config, index, old, left, models, support, self._merge)
        self._order = order
        begin(index, new, self._encoder.space)

    def _measure(self) -> None:
        seconds = self._earlier + time.monotonic() - self._began
        self._curve.measure(self._index, self._merge, self._position, seconds)
