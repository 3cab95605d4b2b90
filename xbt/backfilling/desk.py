"""What one process does for all of them: it keeps the gallery, the order and the curve."""

from __future__ import annotations

import time

from xbt.backfilling.config import BackfillConfig
from xbt.backfilling.curve_book import CurveBook
from xbt.backfilling.items import ItemsById
from xbt.backfilling.merging import MERGE, is_merge_of, load_merge, save_merge
from xbt.backfilling.opening import backfill_present, begin_part, is_through, marks_of, open_gallery
from xbt.backfilling.order_book import cut, drawn_order, kept_order
from xbt.backfilling.ordering import fit_support_merge
from xbt.backfilling.queries import Models, as_questions, embed_support, load_models, load_questions
from xbt.backfilling.records import CURVE, ORDER, REJECTED, RESULT, Lines
from xbt.backfilling.result import BackfillResult
from xbt.backfilling.work import Chunk, Embedded
from xbt.embedding.checks import require_room
from xbt.encoders import DualEncoder
from xbt.errors import DataError
from xbt.gallery import Gallery, Merge, RankMerge
from xbt.run_dir import RunDirectory
from xbt.store.lock import WriterLock


class Desk:
    """Keeps a backfill's books; the main process alone uses its own.

    Args:
        config: What to do.
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
        self._merge: Merge = RankMerge()
        self._order: list[str] = []
        self._marks: dict[str, int] = {}
        self._position = self._moved = 0
        self._began = self._earlier = 0.0
        self._why: str | None = None

    def prepare(self) -> list[Chunk]:
        """Opens everything, draws or finds the order, and measures where the gallery stands.

        Returns:
            What is to be embedded, most urgent first.

        Raises:
            XbtError: If a setting, the gallery, the pairs or a model cannot be used.
        """
        path = self._run.path
        gallery = self._gallery = open_gallery(self._config.gallery, self._config.store)
        through = is_through(gallery, self._encoder.space)
        if through and not (path / ORDER).is_file():
            raise DataError(
                f"the gallery {gallery.path} is of the space of {self._encoder.name} already, so there is "
                "nothing to backfill; give the encoder that shall replace the one it was made with"
            )
        self._require_images()
        self._lock.acquire()
        if self._config.overwrite:
            for name in (ORDER, CURVE, REJECTED, RESULT):
                (path / name).unlink(missing_ok=True)
        self._curve, self._rejected = CurveBook(path / CURVE), Lines(path / REJECTED)
        self._began = time.monotonic()
        if through:
            self._order = kept_order(path / ORDER, []) or []
            self._position = len(self._order)
            return []
        self._prepare_order()
        return self._prepare_chunks()

    def commit(self, chunk: Chunk, done: Embedded) -> str | None:
        """Writes a chunk to the gallery, and if it is time to, updates its index and measures.

        Args:
            chunk: Which.
            done: Its vectors and rejections.

        Returns:
            Why the job is to end now; ``None`` if it goes on.

        Raises:
            StoreError: If the gallery or the records cannot be written.
        """
        # On record first: a kill in between leaves an item that is searched as before.
        self._rejected.append(
            [{"id": chunk.ids[place], "reason": reason} for place, reason in done.rejected.items()]
        )
        ids = [chunk.ids[place] for place in done.places]
        space = self._encoder.space
        self._moved += backfill_present(self._gallery, done.vectors, ids, space, self._marks)
        self._position = chunk.end
        if self._position % self._config.evaluate_every == 0:
            self._gallery.prepare_index()
            self._measure()
        self._why = self._reason_to_stop()
        return self._why

    def finish(self) -> BackfillResult:
        """Measures where the gallery has come to and writes ``result.json``.

        Raises:
            StoreError: If the gallery cannot be read any more.
        """
        self._gallery.prepare_index()
        self._measure()
        if self._why is None and self._position < len(self._order):
            self._why = f"max_items {self._config.max_items} are taken up"
        gallery, rejected = self._gallery, len(self._rejected.entries)
        result = BackfillResult(
            items=self._moved,
            rejected=rejected,
            fraction=1.0 if len(gallery.parts) == 1 else gallery.fraction_backfilled,
            position=self._position,
            total=len(self._order),
            why=self._why or "nothing is left to do",
            curve=tuple(self._curve.points),
            stopping_position=self._curve.stopping_position(),
        )
        self._run.write_json(RESULT, result.to_dict())
        return result

    def close(self) -> None:
        """Gives gallery and directory back."""
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
        ids = self._gallery.ids
        if ids and not any(name in self._items for name in ids):
            raise DataError(
                f"none of the {len(ids)} items of the gallery {self._gallery.path}, first {ids[0]!r}, is "
                f"among the {len(self._items)} images of {self._items.name}; give the images that it was "
                "made of, read in the same way"
            )

    def _prepare_order(self) -> None:
        """Finds the order and the merge, or makes them; from then on the gallery has a new part."""
        config, gallery, path = self._config, self._gallery, self._run.path
        asking = load_questions(config, gallery)
        models = load_models(config, self._encoder)
        self._require_old_space(models)
        assert gallery.path is not None
        waiting = gallery.ids_of(gallery.parts[0].name)
        require_room(gallery.path, len(waiting), self._encoder.dim, "float16")
        if asking is not None:
            self._curve.questions = as_questions(asking, models)
        order = kept_order(path / ORDER, waiting)
        support, spaces = None, (gallery.parts[0].space, self._encoder.space)
        if config.support is not None and (order is None or not is_merge_of(gallery.path, *spaces)):
            support = embed_support(config.support, models, gallery, config.batch_size)
            self._merge = fit_support_merge(support, config.seed)
            save_merge(gallery.path, self._merge, *spaces)
        elif (gallery.path / MERGE).is_file():
            self._merge = load_merge(gallery.path, *spaces)
        self._run.prepare()
        if order is None:
            order = drawn_order(path / ORDER, config, gallery, models, support, self._merge)
        self._order = order
        begin_part(gallery, self._encoder.space)

    def _prepare_chunks(self) -> list[Chunk]:
        listed = self._gallery.ids_of(self._gallery.parts[0].name)
        self._marks = marks_of(self._gallery, listed)
        waiting = set(listed)
        waiting -= {entry["id"] for entry in self._rejected.entries}
        self._position, chunks = cut(self._order, waiting, self._config)
        self._earlier, self._began = self._curve.seconds, time.monotonic()
        if not self._curve.points or self._position % self._config.evaluate_every == 0:
            self._measure()
        self._why = self._reason_to_stop()
        return chunks if self._why is None else []

    def _require_old_space(self, models: Models) -> None:
        old = self._gallery.parts[0].space
        for encoder in filter(None, (models.old, models.asking)):
            if old is not None:
                old.require(encoder.space, f"the encoder {encoder.name}, which speaks for the gallery,")

    def _measure(self) -> None:
        seconds = self._earlier + time.monotonic() - self._began
        self._curve.measure(self._gallery, self._merge, self._position, seconds)
