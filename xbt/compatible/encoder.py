"""The compatible encoder: the new CLIP behind an encoder's interface, with vectors in the old space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.compatible import saving
from xbt.encoders import DualEncoder, EncodedImages, has_lora, load_lora
from xbt.encoders.base import Precision
from xbt.encoders.image_batching import NamedImage, as_images
from xbt.encoders.text_batching import ShortContext, TextTransform, as_texts
from xbt.errors import ConfigError, DataError, EncoderError, SpaceMismatchError
from xbt.hub import (
    CONFIG_NAME,
    CardData,
    CardFacts,
    HubAccess,
    HubArtifact,
    LoadOptions,
    Naming,
    fetch,
    is_snapshot,
    read_json,
)
from xbt.images import ImageSource
from xbt.projections.base import LinearProjection, Modality, Projection
from xbt.projections.ensemble import QueryEnsemble, Slerp, direction_of
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_vectors

_CHUNK_ROWS = 8192
"""Rows that are combined at a time."""


class CompatibleEncoder(DualEncoder, HubArtifact):
    """New encoder + LoRA + projection (+ ensemble) behind the interface of an encoder.

    It replaces the old encoder: ``encode_texts`` and ``encode_images`` return (n, old_dim) float32 CPU unit
    rows in ``space``, the old model's space. With an ensemble these are queries: mixtures of the new model's
    vector and the old model's. The old encoder computes the old vectors, or the caller passes them.

    Args:
        new: The new encoder, with or without LoRA. Without LoRA it is checked against the space the
            projection was made for.
        projection: The map from its space to the old one; it must know its old space.
        ensemble: How queries are combined with the old model's.
        old: The old encoder, if the ensemble needs it and ``old_vectors`` will not be given.

    Raises:
        SpaceMismatchError: If an encoder is not the one the projection was made for, or the ensemble is of
            another space; the message names both.
        ConfigError: If an old encoder is given without an ensemble.
    """

    format_name = "compatible_encoder"
    config_keys = ("base", "lora", "ensemble", "old", "new_space", "old_space")
    lora_targets: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        new: DualEncoder,
        projection: Projection,
        ensemble: QueryEnsemble | None = None,
        old: DualEncoder | None = None,
    ) -> None:
        _check_new(new, projection)
        _check_ensemble(projection, ensemble, old)
        self.new = new
        self.old = old
        self._folded: DualEncoder | None = None
        super().__init__(
            new.name,
            new.module,
            projection.old_dim,
            new.context_length,
            new.preprocessing,
            new.image_transform,
        )
        self.projection = projection.to(new.device).eval()
        self.ensemble = None if ensemble is None else ensemble.to(new.device).eval()

    @property
    def module(self) -> nn.Module:
        """The new encoder's CLIP, which peft wraps once LoRA is added."""
        return self.new.module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.new.module = module

    @property
    def precision(self) -> Precision:
        """Precision of the new encoder, and of the old one if there is one; the rest stays in fp32."""
        return self.new.precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        for encoder in filter(None, (self.new, self.old)):
            encoder.precision = precision

    @property
    def space(self) -> EmbeddingSpace:
        """The old space, which this encoder's vectors belong to."""
        assert self.projection.old_space is not None
        return self.projection.old_space

    @property
    def device(self) -> torch.device:
        """The device of the new encoder."""
        return self.new.device

    def to(self, device: str | torch.device) -> Self:
        """Move encoders and projection, and return the compatible encoder itself."""
        for encoder in filter(None, (self.new, self.old)):
            encoder.to(device)
        self.projection.to(device)
        if self.ensemble is not None:
            self.ensemble.to(device)
        return self if self._folded is None else self.fold()

    def fold(self) -> Self:
        """Multiply the projection into the last layers of the new towers, and return the encoder itself.

        Encoding then costs as much as without a projection, and the vectors change by rounding only. Saved
        files do not change: they keep projection and base apart. ``new`` does not change either.

        Raises:
            EncoderError: If the projection is more than a matrix, the ensemble needs the length of the
                projected vectors, or a tower does not end in a matrix.
        """
        if not isinstance(self.projection, LinearProjection) or not self.projection.foldable:
            raise EncoderError(
                f"the projection of '{self.name}' (a {type(self.projection).__name__}) is more than a matrix "
                "and cannot be folded into the encoder; fit a linear one without offset"
            )
        combinations = self.ensemble.directions if self.ensemble else {}
        if any(isinstance(rule, Slerp) and rule.padded for rule in combinations.values()):
            raise EncoderError(
                f"the ensemble of '{self.name}' needs the length of projected vectors, which folding loses; "
                "use slerp without padding, or the projection unfolded"
            )
        self._folded = self.new.folded(self.projection.weight.detach())
        return self

    @property
    def text_transform(self) -> TextTransform:
        """The new encoder's :attr:`DualEncoder.text_transform`."""
        return self.new.text_transform

    @property
    def short_context(self) -> ShortContext | None:
        """The new encoder's :attr:`DualEncoder.short_context`."""
        return self.new.short_context

    def invalidate_space(self) -> None:
        """Forget the new encoder's probe; see :meth:`DualEncoder.invalidate_space`."""
        self.new.invalidate_space()

    def encode_texts(
        self,
        texts: Sequence[str],
        batch_size: int = 256,
        progress: bool = False,
        num_workers: int = 0,
        old_vectors: Vectors | None = None,
    ) -> Tensor:
        """Encode texts as :meth:`DualEncoder.encode_texts` does, as queries if there is an ensemble.

        Args:
            texts: n texts.
            batch_size: As for :meth:`DualEncoder.encode_texts`.
            progress: Whether every encoder that runs shows a bar.
            num_workers: As for :meth:`DualEncoder.encode_texts`.
            old_vectors: (n, old_dim) vectors of the old model for the same texts, instead of its encoder.

        Returns:
            (n, old_dim) float32 CPU tensor with unit rows and without a graph; n may be 0.

        Raises:
            EncoderError: If the ensemble needs old vectors, but there is no old encoder and none are given.
            ConfigError: If old vectors are given without an ensemble.
            DataError, SpaceMismatchError: As :meth:`DualEncoder.encode_texts`, or if the old vectors do not
                fit the texts.
        """
        checked = as_texts(texts)
        if self.ensemble is None:
            _refuse_old_vectors(old_vectors)
            # Not the parent's method: its warning about cut texts would point here, not to the caller.
            vectors, cut = self._encode_texts(checked, batch_size, progress, num_workers, self.precision)
            self._warn_cut(cut, len(checked))
            return vectors
        sides = self._sides("text", old_vectors, len(checked))
        old, new = (
            None if encoder is None else encoder.encode_texts(checked, batch_size, progress, num_workers)
            for encoder in (sides.old, sides.new)
        )
        return self._query(sides.given if old is None else old, new, "text")

    def encode_images(
        self,
        images: Sequence[ImageSource],
        batch_size: int = 64,
        progress: bool = False,
        num_workers: int = 0,
        old_vectors: Vectors | None = None,
    ) -> Tensor:
        """Encode images as :meth:`DualEncoder.encode_images` does, as queries if there is an ensemble.

        Args:
            images: n PIL images, paths, or bytes of encoded images.
            batch_size: As for :meth:`DualEncoder.encode_images`.
            progress: As for :meth:`DualEncoder.encode_images`.
            num_workers: Worker processes per encoder; if both encoders run, each has as many.
            old_vectors: (n, old_dim) vectors of the old model for the same images, instead of its encoder.

        Returns:
            (n, old_dim) float32 CPU tensor with unit rows and without a graph; n may be 0.

        Raises:
            EncoderError, ConfigError: As :meth:`encode_texts`.
            ImageError, DataError, SpaceMismatchError: As :meth:`DualEncoder.encode_images`, or if the old
                vectors do not fit the images.
        """
        if self.ensemble is None:
            _refuse_old_vectors(old_vectors)
            return super().encode_images(images, batch_size, progress, num_workers)
        items = as_images(images)
        sides = self._sides("image", old_vectors, len(items))
        if sides.given is None:
            return super().encode_images(items, batch_size, progress, num_workers)
        new = None
        if sides.new is not None:
            new = sides.new.encode_images(items, batch_size, progress, num_workers)
        return self._query(sides.given, new, "image")

    def _encode_texts(
        self, texts: list[str], batch_size: int, *options: Any, **named: Any
    ) -> tuple[Tensor, int]:
        if self.new.has_towers:
            return super()._encode_texts(texts, batch_size, *options, **named)
        vectors, cut = self.new._encode_texts(texts, batch_size, *options, **named)
        return self._mapped(vectors, "text"), cut

    def _encode_batches(
        self, batches: Iterable[Sequence[NamedImage]], num_workers: int, precision: Precision
    ) -> Iterator[EncodedImages]:
        if self.ensemble is None and self.new.has_towers:
            yield from super()._encode_batches(batches, num_workers, precision)
            return
        if self.ensemble is None:
            for encoded in self.new._encode_batches(batches, num_workers, precision):
                yield encoded._replace(vectors=self._mapped(encoded.vectors, "image"))
            return
        sides = self._sides("image")
        streams = [
            encoder._encode_batches(stream, num_workers, precision)
            for encoder, stream in zip((sides.new, sides.old), tee(batches), strict=True)
            if encoder
        ]
        for results in zip(*streams, strict=True):
            # An image is refused if either encoder refuses it.
            kept = sorted(set.intersection(*(set(encoded.kept) for encoded in results)))
            rows = [encoded.vectors[[encoded.kept.index(k) for k in kept]] for encoded in results]
            vectors = self._query(rows[-1] if sides.old else None, rows[0] if sides.new else None, "image")
            rejected, notes = results[-1].rejected | results[0].rejected, results[-1].notes | results[0].notes
            yield EncodedImages(vectors, kept, rejected, notes)

    def _sides(self, modality: Modality, old_vectors: Vectors | None = None, count: int = 0) -> _Sides:
        """Choose the encoders that have to run for queries of a modality, before any of them runs."""
        assert self.ensemble is not None
        direction = direction_of(modality)
        new = (self._folded or self.new) if self.ensemble.needs_new(direction) else None
        if new is not None:
            new.precision = self.precision
        if not self.ensemble.needs_old(direction):
            return _Sides(new, None, None)
        if old_vectors is not None:
            if len(old_vectors) != count:
                raise DataError(
                    f"old_vectors has {len(old_vectors)} rows for {count} queries; give one for each"
                )
            empty = torch.zeros(0, self.dim)
            return _Sides(new, None, as_vectors(old_vectors, "old_vectors", self.dim) if count else empty)
        if self.old is None:
            raise EncoderError(
                f"{modality} queries of '{self.name}' are combined with the old model's "
                f"({self.ensemble.combination(direction)}), but there is no old encoder; give old=, so that "
                f"{self.space} also runs on every query, or its vectors as old_vectors="
            )
        return _Sides(new, self.old, None)

    def _mapped(self, vectors: Tensor, modality: Modality) -> Tensor:
        """Project vectors of an encoder without towers, as unit rows on the CPU."""
        with torch.no_grad():
            return normalize(self._projected(vectors.to(self.device), modality).float(), dim=-1).cpu()

    def _query(self, old: Tensor | None, new: Tensor | None, modality: Modality) -> Tensor:
        """Combine vectors of both encoders, a few thousand at a time; on the CPU and without a graph."""
        assert self.ensemble is not None
        parts = [torch.zeros(0, self.dim)]
        rows_of = old if old is not None else new
        assert rows_of is not None
        with torch.no_grad():
            for start in range(0, len(rows_of), _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                first = None if old is None else old[rows].to(self.device)
                second = None if new is None else self._projected(new[rows].to(self.device), modality)
                parts.append(self._combined(first, second, modality).float().cpu())
        return torch.cat(parts)

    def _projected(self, vectors: Tensor, modality: Modality) -> Tensor:
        """(n, old_dim) projected vectors of any length; a folded encoder's vectors are projected already."""
        if self._folded is not None:
            return vectors
        with torch.autocast(vectors.device.type, enabled=False):
            return self.projection.project(vectors, modality)

    def _combined(self, old: Tensor | None, new: Tensor | None, modality: Modality) -> Tensor:
        # Projection and ensemble are a hundredth of the work and stay in fp32 where towers run in bf16.
        with torch.autocast(self.device.type, enabled=False):
            combined: Tensor = self.ensemble(old, new, direction_of(modality))  # type: ignore[misc]
        return combined

    def _text_features(self, tokens: Tensor) -> Tensor:
        tower = self._folded or self.new
        return self._without_old(tower._embed_whole(tokens), "text")

    def _image_features(self, pixels: Tensor) -> Tensor:
        tower = self._folded or self.new
        return self._without_old(tower.embed_pixels(pixels), "image")

    def _without_old(self, vectors: Tensor, modality: Modality) -> Tensor:
        """Project and combine the new encoder's vectors where no old vectors can be had."""
        projected = self._projected(vectors, modality)
        if self.ensemble is None:
            return projected
        if self.ensemble.needs_old(direction_of(modality)):
            raise EncoderError(
                f"'{self.name}' combines its queries with the old model's, which tokens and pixels of the "
                "new model cannot give; use encode_texts and encode_images, or an encoder without ensemble"
            )
        return self._combined(None, projected, modality)

    def _towers(self) -> list[nn.Module]:
        old = self.old._towers() if self.old is not None else []
        return (self._folded or self.new)._towers() + old

    def _config(self, naming: Naming, card: CardData) -> dict[str, Any]:
        return saving.described(self, naming, card)

    def _write_files(self, directory: Path, naming: Naming, card: CardData) -> list[str]:
        return saving.write_parts(self, directory, naming, card)

    def _facts(self, card: CardData) -> CardFacts:
        return saving.facts(self, card)

    @classmethod
    def _read(
        cls,
        directory: Path,
        device: str | torch.device,
        access: HubAccess,
        base: DualEncoder | str | None = None,
        old: DualEncoder | str | None = None,
        load_old: bool = True,
    ) -> Self:
        config = cls._open_config(directory)
        saved, foreign = saving.read(config), is_snapshot(directory)
        if old is not None and saved.ensemble is None:
            raise ConfigError(f"{directory} has no ensemble to use an old encoder; leave out old=")
        what = f"the base model recorded in {directory}"
        at = access.at(saving.recorded_revision(saved.base, saved.new_space))
        new = saving.load_model(base, saved.base, what, "base=", device, foreign, at)
        if has_lora(new):
            raise EncoderError(f"'{new.name}' already has LoRA; give a freshly loaded base")
        saved.new_space.require(new.space, f"the base model given to {directory}")
        if saved.lora:
            load_lora(new, directory / saving.LORA_DIR, merge=True)
        config.check_files()
        tower = None
        if saved.needs_old and (load_old or isinstance(old, DualEncoder)):
            what = f"the old model recorded in {directory}"
            option = "old=, or load_old=False and old_vectors=,"
            at = access.at(saving.recorded_revision(saved.old, saved.projection.old_space))
            tower = saving.load_model(old, saved.old, what, option, device, foreign, at)
        return cls(new, saved.projection, saved.ensemble, tower)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base: DualEncoder | str | None = None,
        old: DualEncoder | str | None = None,
        load_old: bool = True,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load a compatible encoder from a directory or a Hub repository, strictly.

        Args:
            pretrained_model_name_or_path: Directory, or Hub repository ``org/name``.
            base: The new encoder, or its specification on this machine, if the recorded one is not valid
                here. It is changed in place if the saved encoder has LoRA.
            old: The old encoder, or its specification on this machine, likewise; only for an ensemble.
            load_old: Whether to load the old encoder that the saved ensemble needs. Without it queries need
                ``old_vectors``.
            **options: Device and options of the download, as for
                :meth:`~xbt.hub.HubArtifact.from_pretrained`. An encoder that is passed in stays on its
                device; ``revision`` and ``force_download`` apply to the files alone, because the models have
                recorded revisions.

        Returns:
            The encoder, with LoRA merged, so that it costs nothing at search time.

        Raises:
            SavedPartError: If a file is missing, damaged, changed, or of another kind, or a config from the
                Hub names a model by a path.
            EncoderError: If a model cannot be loaded or the LoRA does not fit it.
            SpaceMismatchError: If a model is not the one this was made for; the message names both.
            ConfigError: If an old encoder is given and there is no ensemble.
        """
        return super().from_pretrained(
            pretrained_model_name_or_path, base=base, old=old, load_old=load_old, **options
        )


def load_upgraded(
    source: str | Path,
    new: str | None = None,
    old: str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> CompatibleEncoder:
    """Load a compatible encoder as it was saved, or a projection alone behind its new encoder.

    Args:
        source: Directory or Hub repository of a compatible encoder, or of a projection (stage 1).
        new: Specification of the new encoder, if the recorded one is not valid on this machine.
        old: Specification of the old encoder, likewise; ignored if no ensemble needs it.
        device: Device of the encoders.
        revision: Branch, tag or commit on the Hub.

    Raises:
        SavedPartError: If a file is missing, damaged, or of another kind.
        EncoderError: If a model cannot be loaded.
        SpaceMismatchError: If a model is not the one this was made for; the message names both.
        ConfigError: If a projection does not record its new encoder, and ``new`` is not given.
    """
    directory = fetch(source, revision=revision)
    if read_json(directory / CONFIG_NAME).get("format") != Projection.format_name:
        needed = old if (directory / saving.ENSEMBLE_DIR).is_dir() else None
        return CompatibleEncoder.from_pretrained(directory, base=new, old=needed, device=device)
    projection = Projection.from_pretrained(directory)
    recorded = None if projection.new_space is None else projection.new_space.model
    if new is None and recorded is None:
        raise ConfigError(
            f"the projection {directory} does not say which encoder it was fitted for; give new= as well"
        )
    what = f"the new model recorded in {directory}"
    access = HubAccess(saving.recorded_revision(recorded or "", projection.new_space))
    base = saving.load_model(new, recorded or "", what, "new=", device, is_snapshot(directory), access)
    return CompatibleEncoder(base, projection)


class _Sides(NamedTuple):
    """Sources of a query's two vectors; ``None`` for each that the ensemble does not need."""

    new: DualEncoder | None
    old: DualEncoder | None
    given: Tensor | None


def _check_new(new: DualEncoder, projection: Projection) -> None:
    """Refuse an encoder that the projection was not made for.

    An encoder with LoRA is compared by its dimension only.
    """
    if projection.old_space is None:
        raise SpaceMismatchError(
            "the projection does not know its old space; fit it with old_space= or call set_spaces"
        )
    if new.dim != projection.new_dim:
        raise SpaceMismatchError(
            f"the projection takes {projection.new_dim}-d vectors"
            + (f" of {projection.new_space}" if projection.new_space else "")
            + f", but the encoder is '{new.name}' ({new.dim}-d); load the encoder it was made for"
        )
    if projection.new_space is not None and not has_lora(new):
        projection.new_space.require(new.space, "the encoder given to the projection")


def _check_ensemble(projection: Projection, ensemble: QueryEnsemble | None, old: DualEncoder | None) -> None:
    """Refuse an ensemble or an old encoder of another space, and an old encoder without an ensemble."""
    space = projection.old_space
    assert space is not None
    if ensemble is None:
        if old is not None:
            raise ConfigError(
                f"the old encoder '{old.name}' is only used with an ensemble; give ensemble= as well"
            )
        return
    if ensemble.old_dim != projection.old_dim:
        raise SpaceMismatchError(
            f"the ensemble combines {ensemble.old_dim}-d vectors, but the projection leads to {space}; fit "
            "it on pairs of that space"
        )
    if ensemble.old_space is not None and ensemble.old_space is not space:
        space.require(ensemble.old_space, "the ensemble")
    if old is not None:
        space.require(old.space, "the old encoder given to the ensemble")


def _refuse_old_vectors(old_vectors: Vectors | None) -> None:
    """Refuse old vectors for an encoder without an ensemble."""
    if old_vectors is not None:
        raise ConfigError(
            "old vectors are only used with an ensemble; give the encoder one, or leave them out"
        )
