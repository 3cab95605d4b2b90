"""The identity of an embedding space: the model that made the vectors, and its settings.

Same dimension, other model is the silent failure: scores come out, and they mean nothing. A space therefore
has a *probe* besides its name: its encoder's vectors of sixteen fixed texts and four drawn images. Two spaces
are the same when their probes agree, whatever their names. A probe does not show every difference. If the
probes agree but declared settings differ, the result is *unverified*.

A probe must react to everything that makes two models' vectors incomparable. The texts differ in length,
subject and punctuation. Two zone plates hold every spatial frequency, so they show differences in resampling;
one is larger and one smaller than any CLIP's input. The other images show squashing instead of cropping, and
swapped colours or normalisation.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from xbt.errors import DataError, SpaceMismatchError, UnverifiedSpaceWarning

PROBE_VERSION = 2
"""Incremented whenever a probe text or image changes; probes of different versions cannot be compared."""

PROBE_TEXTS = (
    "a photo of a dog",
    "a red circle",
    "two children playing football in a park",
    "the Eiffel Tower at night",
    "a bowl of noodle soup with an egg",
    "a diagram of a neural network",
    "rain",
    "a close-up of a bee on a yellow flower, out of focus background",
    "an old man reading a newspaper on a bench",
    "small blue square to the left of a large green triangle",
    "a street sign that says STOP",
    "satellite image of farmland",
    "people waiting for a train",
    "a black and white drawing of a sailing ship in a storm",
    "nothing but sky",
    "3 apples, 2 pears & a knife",
)
"""The sixteen fixed texts of a probe."""
MAX_DIM = 2**20
"""Largest dimension of a space that is read."""

SAME_COSINE = 0.999
"""Minimum cosine of every pair of vectors of two probes that agree."""

_TEXT_SETTINGS = ("text_activation", "text_cleaning", "context_length")


class SpaceComparison(NamedTuple):
    """The result of comparing two spaces.

    Attributes:
        same: Whether vectors of the two may be compared with each other.
        verified: Whether this is certain. It is not if a probe is missing, so that only names were compared,
            or if probes agree but declared settings differ.
        reason: The reason in a few words.
    """

    same: bool
    verified: bool
    reason: str

    @property
    def state(self) -> Literal["same", "unverified", "other"]:
        """The result in one word; ``require`` accepts "same", warns at "unverified" and refuses "other"."""
        if not self.same:
            return "other"
        return "same" if self.verified else "unverified"


@dataclass(frozen=True, eq=False)
class EmbeddingSpace:
    """The space that a model's vectors live in.

    Attributes:
        model: The encoder's specification, such as ``"open_clip:ViT-B-32-quickgelu/openai"``.
        dim: Dimension of the vectors.
        preprocessing: Image backend, size, interpolation, mean and standard deviation.
        probe: (20, dim) float32 CPU tensor: vectors of the probe's texts, then of its drawn images. The rows
            of texts are zero for a model without a text tower. ``None`` if the encoder was not available;
            then only names can be compared.
        revision: The commit of the model's Hub repository, if known.
        normalisation: ``"unit"`` for rows of length 1, ``"none"`` for rows as the model gives them.
        settings: Other settings that change vectors: activations, cleaning of texts, context length.
    """

    model: str
    dim: int
    preprocessing: dict[str, Any] = field(default_factory=dict)
    probe: Tensor | None = None
    revision: str | None = None
    normalisation: str = "unit"
    settings: dict[str, Any] = field(default_factory=dict)

    def agreement(self, other: EmbeddingSpace) -> float | None:
        """Smallest cosine between the two probes' vectors, or ``None`` if a probe is missing."""
        cosines = self._cosines(other)
        return None if cosines is None else float(cosines.min())

    def compare(self, other: EmbeddingSpace) -> SpaceComparison:
        """Compare two spaces.

        If both spaces have probes, every pair of probe vectors must have a cosine of at least
        :data:`SAME_COSINE`. The result is verified unless preprocessing or settings that both declare differ.
        Without probes the names decide, and revisions and declared settings if both spaces have them. Such a
        result is never verified.
        """
        if self.dim != other.dim:
            return SpaceComparison(False, True, "their dimensions differ")
        if self.normalisation != other.normalisation:
            rows = f"{self.normalisation!r} and {other.normalisation!r}"
            return SpaceComparison(False, True, f"their rows are normalised differently: {rows}")
        cosines = self._cosines(other)
        if cosines is None:
            return self._compare_names(other)
        lowest = float(cosines.min())
        differences = _differences(self._declared, other._declared)
        if lowest >= SAME_COSINE:
            agreement = f"their probes agree to a cosine of {lowest:.4f}"
            if differences:
                return SpaceComparison(True, False, f"{agreement}, but declared settings differ{differences}")
            return SpaceComparison(True, True, agreement)
        reason = f"their probes agree only to a cosine of {lowest:.3f}"
        texts, images = cosines[: len(PROBE_TEXTS)], cosines[len(PROBE_TEXTS) :]
        if len(images) and float(texts.min()) >= SAME_COSINE:
            reason += f", in images alone{_differences(self._declared, other._declared, 'image')}"
        elif len(images) and float(images.min()) >= SAME_COSINE:
            reason += f", in texts alone{_differences(self._declared, other._declared, 'text')}"
        else:
            reason += differences
        return SpaceComparison(False, True, reason)

    def same_as(self, other: EmbeddingSpace) -> bool:
        """True if vectors of the two spaces may be compared with each other; see :meth:`compare`."""
        return self.compare(other).same

    def require(self, other: EmbeddingSpace, what: str) -> None:
        """Refuse another space.

        Args:
            other: The space of the vectors or model that was passed in.
            what: Name of the thing that was passed in, such as ``"the query vectors"``.

        Raises:
            SpaceMismatchError: If the spaces differ; the message names both and the reason.

        Warns:
            UnverifiedSpaceWarning: If a probe is missing and the space is accepted by its name alone, or the
                probes agree but declared settings differ.
        """
        comparison = self.compare(other)
        if not comparison.same:
            raise SpaceMismatchError(
                f"the space of {what} is {other}, but {self} is needed ({comparison.reason}); "
                "use the model that made it or project into that space"
            )
        if not comparison.verified:
            warnings.warn(
                f"the space of {what}, {other}, is unverified: {comparison.reason}",
                UnverifiedSpaceWarning,
                stacklevel=2,
            )

    @property
    def _declared(self) -> dict[str, Any]:
        size = self.preprocessing.get(
            "size"
        )  # resize_to is only declared if images are cropped from a larger size
        return {**({} if size is None else {"resize_to": size}), **self.preprocessing, **self.settings}

    def _cosines(self, other: EmbeddingSpace) -> Tensor | None:
        ours, theirs = self.probe, other.probe
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return None
        cosines = torch.nn.functional.cosine_similarity(ours, theirs, dim=1)
        absent = ~(ours.any(dim=1) | theirs.any(dim=1))
        return torch.where(absent, 1.0, cosines)

    def _compare_names(self, other: EmbeddingSpace) -> SpaceComparison:
        missing = "one has no probe to compare"
        if self.model != other.model:
            return SpaceComparison(False, False, f"their names differ and {missing}")
        if self.revision and other.revision and self.revision != other.revision:
            return SpaceComparison(False, False, f"their revisions differ and {missing}")
        differences = _differences(self._declared, other._declared)
        if differences:
            return SpaceComparison(False, False, f"{missing}{differences}")
        return SpaceComparison(True, False, f"the names are the same, but {missing}")

    def __str__(self) -> str:
        revision = f" at {self.revision[:12]}" if self.revision else ""
        return f"'{self.model}'{revision} ({self.dim}-d)"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; the probe is stored as base64 of little-endian fp16."""
        probe = None
        if self.probe is not None:
            probe = base64.b64encode(self.probe.numpy().astype("<f2").tobytes()).decode("ascii")
        return {
            "model": self.model,
            "revision": self.revision,
            "dim": self.dim,
            "normalisation": self.normalisation,
            "preprocessing": self.preprocessing,
            "settings": self.settings,
            "probe": probe,
            "probe_version": PROBE_VERSION,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the result of :meth:`to_dict`; a probe of another version is dropped.

        Raises:
            DataError: If it is not an object, or a value is missing or malformed.
        """
        if not isinstance(data, Mapping):
            raise DataError(f"a space must be a JSON object, got a {type(data).__name__}; save it again")
        dim = data.get("dim")
        if not isinstance(dim, int) or isinstance(dim, bool) or not 0 <= dim <= MAX_DIM:
            raise DataError(f"the dim of a space must be a whole number up to {MAX_DIM}, got {_shown(dim)}")
        return cls(
            _text(data, "model"),
            dim,
            _object(data, "preprocessing"),
            _probe(data, dim),
            None if data.get("revision") is None else _text(data, "revision"),
            _text({"normalisation": "unit", **data}, "normalisation"),
            _object(data, "settings"),
        )


def draw_probe_images() -> list[Image.Image]:
    """Draw the four fixed images: a large and a small zone plate, an off-centre disc, coloured dots.

    Returns:
        Four RGB images of 600×600, 48×48, 96×64 and 400×260 pixels, the same on every machine.
    """
    disc = Image.new("RGB", (96, 64), (30, 120, 60))
    ImageDraw.Draw(disc).ellipse((16, 8, 64, 56), fill=(240, 200, 30))
    return [_zone_plate(600), _zone_plate(48), disc, _dots(400, 260)]


def _zone_plate(size: int) -> Image.Image:
    """Rings that become finer outwards, at a different rate per colour; any resampling changes them."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    squared = (x - 0.3 * size) ** 2 + (y - 0.4 * size) ** 2
    planes = [127.5 + 127.5 * np.cos(np.pi * rate * squared / (2.2 * size)) for rate in (1.0, 1.3, 0.8)]
    return Image.fromarray(np.rint(np.stack(planes, axis=-1)).astype(np.uint8))


def _dots(width: int, height: int) -> Image.Image:
    """Pseudo-random colours: Knuth's multiplicative hash of each pixel's number."""
    numbers = np.arange(1, 3 * width * height + 1, dtype=np.uint64)
    values = (numbers * np.uint64(2654435761) >> np.uint64(13)) & np.uint64(255)
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))


def _text(data: Mapping[str, Any], key: str) -> str:
    value: Any = data.get(key)
    try:
        return str(value.encode(), "utf-8")  # a lone surrogate cannot be encoded
    except (AttributeError, UnicodeEncodeError) as error:
        raise DataError(f"the {key} of a space must be text, got {_shown(value)}; save it again") from error


def _object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise DataError(f"the {key} of a space must be a JSON object, got {_shown(value)}; save it again")
    for name, setting in value.items():
        for item in setting if isinstance(setting, list | tuple) else [setting]:
            if item is not None and not isinstance(item, str | int | float):
                raise DataError(
                    f"the {key} of a space must hold plain values or lists of them, but {name:.80} holds a "
                    f"{type(item).__name__}; save it again"
                )
    return dict(value)


def _shown(value: Any) -> str:
    # Containers are not printed, because they may be nested too deeply.
    return f"{value!a:.80}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _probe(data: Mapping[str, Any], dim: int) -> Tensor | None:
    encoded = data.get("probe")
    if encoded is None or data.get("probe_version") != PROBE_VERSION:
        return None
    try:
        decoded = base64.b64decode(encoded, validate=True)
        values = np.frombuffer(decoded, dtype="<f2").astype(np.float32).reshape(-1, dim)
    except (TypeError, ValueError) as error:  # not text, not base64, not fp16, or not rows of dim
        raise DataError(f"the probe of a space is damaged ({error}); save the space again") from error
    if not len(values) or not np.isfinite(values).all():
        raise DataError("the probe of a space is empty or not finite; save the space again")
    return torch.from_numpy(values)


def _differences(ours: dict[str, Any], theirs: dict[str, Any], tower: str | None = None) -> str:
    """The declared settings that differ, of both towers or of one, as the end of a sentence."""
    keys = [key for key in ours if key in theirs and _plain(ours[key]) != _plain(theirs[key])]
    if tower is not None:
        keys = [key for key in keys if (key in _TEXT_SETTINGS) == (tower == "text")]
    listed = ", ".join(f"{key} {_plain(ours[key])} and {_plain(theirs[key])}" for key in keys)
    return f": {listed}" if listed else ""


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
