"""The job of ``xbt fit``: vectors of the same items under both models, a projection, and what uses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xbt.choosing_job import ChooseProjectionConfig, embed_pairs, encoder_if_needed, run_choice
from xbt.cli.fit_config import AUTO, FitConfig
from xbt.compatible import CompatibleEncoder
from xbt.data import load_readable_pairs, read_captions
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, DataError
from xbt.projections import Decision, PairVectors, Projection, fit_projection
from xbt.projections.fitting import check_options, options_of
from xbt.projections.sources import Source
from xbt.run_dir import RunDirectory
from xbt.store import EmbeddingStore

CAPTION = "caption"


@dataclass(frozen=True)
class FitResult:
    """What was fitted and where it is.

    Attributes:
        method: By which method.
        items: Items the projection was fitted to; ``None`` where the decision tells.
        dims: Dimension of the new and of the old vectors.
        decision: The choice of ``auto``.
        projection: Directory of the projection.
        compatible: Directory of the compatible encoder; ``None`` where the new encoder was not named.
    """

    method: str
    items: int | None
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
        # Behind a choice the projection alone is not what was chosen.
        if self.decision is None or self.compatible is None:
            lines.append(f"projection: {self.projection}")
        if self.compatible is not None:
            lines.append(f"compatible encoder: {self.compatible}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Material:
    """What is fitted, to what, and by what.

    Attributes:
        sides: Vectors of the same items of the new and of the old model.
        items: How many.
        pairs: Of both models.
        encoders: The new and the old encoder, where they are named.
    """

    sides: tuple[Source, Source]
    items: int
    pairs: PairVectors | None
    encoders: tuple[DualEncoder | None, DualEncoder | None]


def run_fit(config: FitConfig) -> FitResult:
    """Fits or chooses a projection and saves it, with the encoder that uses it where that is named.

    Args:
        config: What to do.

    Returns:
        What was fitted and where it is; print it.

    Raises:
        XbtError: If an encoder, a store, the captions, the pairs or a setting cannot be used.

    Warns:
        UserWarning: If images were left out because they cannot be decoded.
    """
    if config.is_plain_choice:
        return _chosen_as_the_recipe_does(config)
    method, options = config.chosen_method, dict(config.options)
    if method == AUTO:
        own = {name: getattr(config, name) for name in ("thorough", "use_old", "confidence", "folds", "seed")}
        options = {**own, **options}
    else:
        check_options(method, options)
        if "seed" in options_of(method):
            options.setdefault("seed", config.seed)
    run = RunDirectory(config.output_dir, config, config.overwrite)
    material = _gather(config)
    new, old = material.encoders
    fitted = fit_projection(
        *material.sides,
        method,
        pairs=material.pairs,
        new_space=None if new is None else new.space,
        old_space=None if old is None else old.space,
        **options,
    )
    run.prepare()
    return _save(run, method, material, fitted)


def _chosen_as_the_recipe_does(config: FitConfig) -> FitResult:
    """The choice of ``recipes/choose_projection.py``, with the same files."""
    names = ChooseProjectionConfig.__dataclass_fields__
    # What the command line has no flag for is one of the method's options, and then this is no plain choice.
    given = {name: getattr(config, name) for name in names if hasattr(config, name)}
    decision = run_choice(ChooseProjectionConfig(**given))
    compatible = Path(config.output_dir) / "compatible"
    projection = decision.projection
    dims = projection.new_dim, projection.old_dim
    return FitResult(AUTO, None, dims, decision, compatible / "projection", compatible)


def _gather(config: FitConfig) -> _Material:
    """Loads encoders, and opens or embeds what the projection is fitted to."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pairs = None if config.pairs is None else load_readable_pairs(config.pairs, progress=True)[0]
    taken = set() if pairs is None else set(pairs.texts)
    corpus, stores = None, None
    if config.captions is not None:
        corpus = [text for text in dict.fromkeys(read_captions(config.captions)) if text not in taken]
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
    vectors = None if pairs is None or new is None or old is None else embed_pairs(pairs, new, old)
    if stores is not None:
        _require_spaces(stores, (new, old))
        sides, count = _without(stores, taken)
        return _Material(sides, count, vectors, (new, old))
    assert corpus is not None
    assert new is not None
    assert old is not None
    embedded = new.encode_texts(corpus, progress=True), old.encode_texts(corpus, progress=True)
    return _Material(embedded, len(corpus), vectors, (new, old))


def _require_spaces(
    stores: tuple[EmbeddingStore, EmbeddingStore], encoders: tuple[DualEncoder | None, DualEncoder | None]
) -> None:
    for store, encoder, flag in zip(stores, encoders, ("--new", "--old"), strict=True):
        if encoder is not None and store.space is not None:
            encoder.space.require(store.space, f"{flag}_store {store.path}")
        elif encoder is None and store.space is None:
            raise DataError(
                f"{flag}_store {store.path} does not say which model made its vectors, and a projection must "
                f"know; give {flag} as well"
            )


def _without(
    stores: tuple[EmbeddingStore, EmbeddingStore], taken: set[str]
) -> tuple[tuple[Source, Source], int]:
    """The stores as they are or, where captions of the pairs are in them, the vectors of the others."""
    first = stores[0]
    if not taken or CAPTION not in first.columns:
        return stores, len(first)
    told = first.metadata([CAPTION])[CAPTION].to_pylist()
    rows = np.array([row for row, text in enumerate(told) if text not in taken], np.int64)
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


def _save(run: RunDirectory, method: str, material: _Material, fitted: Projection | Decision) -> FitResult:
    """Writes the projection, and what makes queries of it."""
    new, old = material.encoders
    decision = fitted if isinstance(fitted, Decision) else None
    projection = fitted.projection if isinstance(fitted, Decision) else fitted
    if decision is not None:
        decision.save(run.path)
        (run.path / "decision.txt").write_text(f"{decision}\n", encoding="utf-8")
    else:
        projection.save_pretrained(run.path / "projection")
    compatible = None
    if new is not None and projection.old_space is not None:
        ensemble = None if decision is None else decision.ensemble
        beside = None if decision is None or old is None else encoder_if_needed(decision, old)
        compatible = run.path / "compatible"
        CompatibleEncoder(new, projection, ensemble, beside).save_pretrained(compatible)
    dims = projection.new_dim, projection.old_dim
    result = FitResult(method, material.items, dims, decision, run.path / "projection", compatible)
    run.write_json("result.json", result.to_dict())
    return result
