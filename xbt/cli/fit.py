"""The job of ``xbt fit``: embed items with both models, fit or choose a projection, and save it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xbt.compatible.encoder import CompatibleEncoder
from xbt.data import CaptionSource, ImageTextPairs, PairSource, load_readable_pairs, read_captions
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, DataError
from xbt.evaluation.cells import LazyImages
from xbt.projections.auto.choose import choose_projection
from xbt.projections.auto.decision import Decision
from xbt.projections.auto.selection import SelectionOptions
from xbt.projections.base import Projection
from xbt.projections.fitting import METHODS, fit_projection, grouped_options, option_names
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source
from xbt.run_dir import RunDirectory
from xbt.store.store import EmbeddingStore

AUTO, CLOSED_FORM = "auto", "procrustes"
_AUTO_ALONE = {"thorough": False, "use_old": True, "ks": [1, 5, 10], "confidence": 0.95, "every_k": False,
               "folds": 5}  # fmt: skip


@dataclass
class FitConfig:
    """Fit a projection from the new space to the old one, or choose one by held-out image-text pairs.

    The projection is fitted to captions, which both encoders embed, or to two stores of the same items. With
    pairs, candidates are compared on held-out queries, and the old query is kept where no gain is shown.

    Writes to the output directory: ``projection/``; after a choice ``decision.json``; if the new encoder is
    given ``compatible/``, the encoder of queries for the old gallery.
    """

    output_dir: str
    """Output directory."""
    old: str | None = None
    """The encoder that embedded the gallery; needed for captions and pairs."""
    new: str | None = None
    """The encoder that will query it; needed for captions and pairs."""
    captions: CaptionSource | None = None
    """Text corpus to fit to. Give this or the two stores."""
    old_store: str | None = None
    """Store of any items under the old encoder."""
    new_store: str | None = None
    """Store of the same items, in the same order, under the new encoder."""
    pairs: PairSource | None = None
    """Image-text pairs, for the choice (auto) or for methods that learn from them; their captions are removed
    from the corpus."""
    method: str | None = None
    """auto, which chooses (the default with pairs); procrustes (the default without), ridge, low_rank,
    whitened_procrustes, lambda_orthogonal, mean_shift, identity, mlp or xbt."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the method, such as --options.noise 0.3."""
    thorough: bool = False
    """auto: also try the trained projections, which takes minutes."""
    use_old: bool = True
    """auto: whether the old model may run at search time, beside the new one."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """auto: cut-offs whose mean recall decides; [1] uses R@1 only."""
    confidence: float = 0.95
    """auto: one-sided confidence of the gain that a direction needs to be deployed."""
    every_k: bool = False
    """auto: whether every k must gain with that confidence, not only their mean."""
    folds: int = 5
    """auto: folds of the cross-validation."""
    seed: int = 0
    """Seed of folds and bootstrap, and of the noise and order of trained methods."""
    device: str | None = None
    """Device of the encoders; by default the GPU if there is one."""
    overwrite: bool = False
    """Replace the results of another run in the output directory."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If there is nothing to fit to, or a setting needs another one that is missing.
        """
        stores = [self.old_store, self.new_store]
        if any(stores) and not all(stores):
            missing = "--old_store" if self.old_store is None else "--new_store"
            raise ConfigError(f"{missing} is missing; two stores of the same items are needed")
        if any(stores) == (self.captions is not None):
            given = "both were" if any(stores) else "neither was"
            raise ConfigError(f"give either --captions.source or --old_store and --new_store: {given} given")
        for name in ("captions", "pairs"):
            if getattr(self, name) is not None and None in (self.old, self.new):
                raise ConfigError(
                    f"--{name}.source is embedded by both encoders; give --old and --new as well"
                )
        if self.chosen_method != AUTO:
            for name, usual in _AUTO_ALONE.items():
                if getattr(self, name) != usual:
                    raise ConfigError(
                        f"--{name} is for --method auto, not for {self.chosen_method}; leave it out"
                    )

    @property
    def chosen_method(self) -> str:
        """The method; by default auto with pairs and Procrustes without."""
        return self.method or (CLOSED_FORM if self.pairs is None else AUTO)

    @property
    def selection(self) -> dict[str, Any]:
        """Options of auto, by name; see :class:`~xbt.projections.SelectionOptions`."""
        selection = {name: getattr(self, name) for name in (*_AUTO_ALONE, "seed")}
        return {**selection, "ks": tuple(self.ks), **self.options}


CAPTION = "caption"


@dataclass(frozen=True)
class FitResult:
    """Result of a fit and where it is saved.

    ``items`` is the number of items that the projection was fitted to; ``dims`` are the new and the old
    dimension. ``decision`` is set for ``auto``, and ``compatible`` if the new encoder was given.
    """

    method: str
    items: int
    dims: tuple[int, int]
    decision: Decision | None
    projection: Path
    compatible: Path | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "method": self.method,
            "items": self.items,
            "new_dim": self.dims[0],
            "old_dim": self.dims[1],
            "projection": str(self.projection),
            "compatible": None if self.compatible is None else str(self.compatible),
            "decision": None if self.decision is None else self.decision.to_dict(),
        }

    def __str__(self) -> str:
        if self.decision is not None:
            lines = [str(self.decision), ""]
        else:
            lines = [
                f"{self.method}: {self.dims[0]} → {self.dims[1]} dimensions, fitted to {self.items:,} items"
            ]
        # A choice may combine the projection with the old query, so the projection alone would mislead.
        if self.decision is None or self.compatible is None:
            lines.append(f"projection: {self.projection}")
        if self.compatible is not None:
            lines.append(f"compatible encoder: {self.compatible}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _FitData:
    """Vectors of the same items of the new and of the old model, and of the pairs; the encoders, if given.

    ``skipped`` images of the pairs cannot be decoded.
    """

    sides: tuple[Source, Source]
    items: int
    pairs: PairVectors | None
    encoders: tuple[DualEncoder | None, DualEncoder | None]
    skipped: list[dict[str, str]] = field(default_factory=list)


def run_fit(config: FitConfig) -> FitResult:
    """Fit or choose a projection and save it, with its compatible encoder if the new encoder is given.

    Raises:
        XbtError: If an encoder, a store, the captions, the pairs or a setting cannot be used.

    Warns:
        UserWarning: If images were left out because they cannot be decoded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a projection is fitted in one process; launch it with --num_processes 1")
    method = config.chosen_method
    # Wrong options are refused before anything is loaded or embedded.
    options = config.selection if method == AUTO else _method_options(config)
    if method == AUTO:
        SelectionOptions.of(options)
    run = RunDirectory(config.output_dir, config, config.overwrite)
    data = _gather(config)
    for name, encoder in zip(("new_space", "old_space"), data.encoders, strict=True):
        options[name] = None if encoder is None else encoder.space
    decision = None
    if method == AUTO:
        decision = choose_projection(*data.sides, pairs=data.pairs, **options)
    fitted = (
        decision.projection if decision else fit_projection(*data.sides, method, pairs=data.pairs, **options)
    )
    run.prepare()
    return _save(run, method, data, fitted, decision)


def _method_options(config: FitConfig) -> dict[str, Any]:
    """The method's options, with the config's seed where the method has one."""
    method, options = config.chosen_method, dict(config.options)
    if method not in METHODS:
        names = ", ".join(sorted([AUTO, *METHODS]))
        raise ConfigError(f"--method {method!r} is not known; use one of {names}")
    grouped_options(method, options)
    if "seed" in option_names(method):
        options.setdefault("seed", config.seed)
    return options


def _gather(config: FitConfig) -> _FitData:
    """Load encoders, and open or embed the vectors to fit to."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    readable = None if config.pairs is None else load_readable_pairs(config.pairs, progress=True)
    pairs, rejected = readable or (None, [])
    held_out = set() if pairs is None else set(pairs.texts)
    corpus, stores = None, None
    if config.captions is not None:
        corpus = [text for text in dict.fromkeys(read_captions(config.captions)) if text not in held_out]
        if not corpus:
            raise ConfigError("every caption is one of the pairs' own; give --captions of other images")
    else:
        assert config.new_store is not None
        assert config.old_store is not None
        stores = EmbeddingStore.open(config.new_store), EmbeddingStore.open(config.old_store)
        if len(stores[0]) != len(stores[1]):
            raise DataError(
                f"--new_store {stores[0].path} has {len(stores[0])} rows and --old_store {stores[1].path} "
                f"has {len(stores[1])}, but both must be of the same items"
            )
    new, old = (None if spec is None else load_encoder(spec, device) for spec in (config.new, config.old))
    skipped = [{"id": image.id, "reason": image.reason} for image in rejected]
    vectors = None if pairs is None or new is None or old is None else embed_pairs(pairs, new, old)
    if stores is not None:
        _require_spaces(stores, (new, old))
        sides, count = _without(stores, held_out)
        return _FitData(sides, count, vectors, (new, old), skipped)
    assert corpus is not None
    assert new is not None
    assert old is not None
    embedded = new.encode_texts(corpus, progress=True), old.encode_texts(corpus, progress=True)
    return _FitData(embedded, len(corpus), vectors, (new, old), skipped)


def _require_spaces(
    stores: tuple[EmbeddingStore, EmbeddingStore], encoders: tuple[DualEncoder | None, DualEncoder | None]
) -> None:
    for store, encoder, flag in zip(stores, encoders, ("--new", "--old"), strict=True):
        if encoder is not None and store.space is not None:
            encoder.space.require(store.space, f"{flag}_store {store.path}")
        elif encoder is None and store.space is None:
            raise DataError(
                f"{flag}_store {store.path} does not record the model of its vectors, which a projection "
                f"needs; give {flag} as well"
            )


def _without(
    stores: tuple[EmbeddingStore, EmbeddingStore], held_out: set[str]
) -> tuple[tuple[Source, Source], int]:
    """Vectors of the stores without those of held-out captions, and their number."""
    first = stores[0]
    if not held_out or CAPTION not in first.columns:
        return stores, len(first)
    captions = first.metadata([CAPTION])[CAPTION].to_pylist()
    rows = np.array([row for row, text in enumerate(captions) if text not in held_out], np.int64)
    if not len(rows):
        raise ConfigError(
            "every caption of the stores is one of the pairs' own; give stores of other captions"
        )
    if len(rows) == len(first):
        return stores, len(first)
    if first.ids != stores[1].ids:
        raise DataError(
            f"{first.path} and {stores[1].path} are not of the same items; embed the same captions"
        )
    return (first.rows(rows), stores[1].rows(rows)), len(rows)


def embed_pairs(pairs: ImageTextPairs, new: DualEncoder, old: DualEncoder) -> PairVectors:
    """Embed pairs with both models; each decodes the images batch by batch."""
    images = LazyImages(pairs)
    (new_texts, new_images), (old_texts, old_images) = (
        (encoder.encode_texts(list(pairs.texts), progress=True), encoder.encode_images(images, progress=True))
        for encoder in (new, old)
    )
    owners = torch.tensor([int(rows[0]) for rows in pairs.positives_t2i])
    return PairVectors(new_texts, old_texts, old_images, owners, new_images)


def _save(
    run: RunDirectory, method: str, data: _FitData, projection: Projection, decision: Decision | None
) -> FitResult:
    """Write the projection, the decision, and the compatible encoder."""
    new, old = data.encoders
    if decision is None:
        projection.save_pretrained(run.path / "projection")
    else:
        decision.save(run.path)
        run.write_json("decision.json", {**decision.to_dict(), "skipped_images": data.skipped})
        (run.path / "decision.txt").write_text(f"{decision}\n", encoding="utf-8")
    compatible = None
    if new is not None and projection.old_space is not None:
        ensemble = None if decision is None else decision.ensemble
        second = old if decision is not None and decision.needs_old else None
        compatible = run.path / "compatible"
        CompatibleEncoder(new, projection, ensemble, second).save_pretrained(compatible)
    dims = projection.new_dim, projection.old_dim
    result = FitResult(method, data.items, dims, decision, run.path / "projection", compatible)
    run.write_json("result.json", result.to_dict())
    return result
