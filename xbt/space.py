"""The identity of an embedding space: which model made the vectors, and how.

Same dimension, other model is the silent failure: scores come out, and they mean nothing. A space therefore
carries, besides names, a *probe*: the vectors its encoder gives for fixed texts and drawn images. Two spaces
are the same when their probes agree, whatever they are called.
"""

from __future__ import annotations

import base64
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from xbt.errors import SpaceMismatchError, UnverifiedSpaceWarning
from xbt.probe import PROBE_TEXTS, PROBE_VERSION

SAME_COSINE = 0.999
"""Two probes agree when every pair of their vectors has at least this cosine."""


class SpaceComparison(NamedTuple):
    """What is known of two spaces' being one.

    Attributes:
        same: Whether vectors of the two may be compared with each other.
        verified: Whether that was measured; where a probe is missing, only names could be compared.
        reason: Why they are told apart, or taken for the same, in a few words.
    """

    same: bool
    verified: bool
    reason: str


@dataclass(frozen=True, eq=False)
class EmbeddingSpace:
    """Where a model's vectors live.

    Attributes:
        model: The encoder's specification, such as ``"open_clip:ViT-B-32-quickgelu/openai"``.
        dim: Dimension of the vectors.
        preprocessing: Image backend, size, interpolation, mean and standard deviation, for people to read.
        probe: (20, dim) float32 CPU tensor, the vectors of the probe's texts followed by those of its drawn
            images (:mod:`xbt.probe`); the texts' rows are zero where a model has no text tower. ``None`` when
            the encoder itself was not at hand, and then only names can be compared.
        revision: The commit of the model's Hub repository, where it is known.
        normalisation: ``"unit"`` for rows of length 1, ``"none"`` for rows as the model gives them.
    """

    model: str
    dim: int
    preprocessing: dict[str, Any] = field(default_factory=dict)
    probe: Tensor | None = None
    revision: str | None = None
    normalisation: str = "unit"

    def agreement(self, other: EmbeddingSpace) -> float | None:
        """Smallest cosine between the two probes' vectors, or ``None`` where a probe is missing."""
        cosines = self._cosines(other)
        return None if cosines is None else float(cosines.min())

    def compare(self, other: EmbeddingSpace) -> SpaceComparison:
        """Whether two spaces are the same, whether that is sure, and why.

        Probes decide where both spaces have one: every pair of probe vectors must have a cosine of at least
        :data:`SAME_COSINE`. Otherwise the names decide, and revision and preprocessing where both are known;
        such an answer is never verified.
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
        if lowest >= SAME_COSINE:
            return SpaceComparison(True, True, f"their probes agree to a cosine of {lowest:.4f}")
        reason = f"their probes agree only to a cosine of {lowest:.3f}"
        texts, images = cosines[: len(PROBE_TEXTS)], cosines[len(PROBE_TEXTS) :]
        if len(images) and float(texts.min()) >= SAME_COSINE:
            reason += f", in images alone{_differences(self.preprocessing, other.preprocessing)}"
        elif len(images) and float(images.min()) >= SAME_COSINE:
            reason += ", in texts alone"
        return SpaceComparison(False, True, reason)

    def same_as(self, other: EmbeddingSpace) -> bool:
        """Whether vectors of the two spaces may be compared with each other; see :meth:`compare`."""
        return self.compare(other).same

    def require(self, other: EmbeddingSpace, what: str) -> None:
        """Refuses a foreign space.

        Args:
            other: The space that was offered.
            what: What was offered, such as ``"the query vectors"``.

        Raises:
            SpaceMismatchError: If the spaces differ; the message names both and why they are told apart.

        Warns:
            UnverifiedSpaceWarning: If a probe is missing and the space is accepted by its name alone.
        """
        found = self.compare(other)
        if not found.same:
            raise SpaceMismatchError(
                f"the space of {what} is {other}, but {self} is needed ({found.reason}); "
                "use the model that made it or project into that space"
            )
        if not found.verified:
            warnings.warn(
                f"the space of {what}, {other}, is unverified: {found.reason}",
                UnverifiedSpaceWarning,
                stacklevel=2,
            )

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
        differences = _differences(self.preprocessing, other.preprocessing)
        if self.preprocessing and other.preprocessing and differences:
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
            "probe": probe,
            "probe_version": PROBE_VERSION,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote; a probe of another version cannot be compared and is dropped.

        Raises:
            KeyError: If a key is missing.
            ValueError: If a value is malformed.
        """
        dim, encoded = data["dim"], data.get("probe")
        probe = None
        if not isinstance(dim, int) or isinstance(dim, bool) or not 0 < dim < 2**31:
            raise ValueError(f"the dimension of a space is a whole number above 0, not {dim!r:.40}")
        for key, kinds in (("model", str), ("revision", str | None), ("normalisation", str)):
            if not isinstance(data.get(key, "unit"), kinds):
                raise ValueError(f"{key} of a space is text, not {data[key]!r:.40}")
        if encoded is not None and data.get("probe_version") == PROBE_VERSION:
            values = np.frombuffer(base64.b64decode(encoded), dtype="<f2").astype(np.float32)
            probe = torch.from_numpy(values.reshape(-1, dim))
            if not len(probe) or not bool(torch.isfinite(probe).all()):
                raise ValueError("the probe of a space is empty, or holds NaN or infinity")
        return cls(
            str(data["model"]),
            dim,
            dict(data.get("preprocessing") or {}),
            probe,
            data.get("revision"),
            str(data.get("normalisation", "unit")),
        )


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Which declared settings differ, as the end of a sentence."""
    keys = [key for key in ours if key in theirs and _plain(ours[key]) != _plain(theirs[key])]
    listed = ", ".join(f"{key} {_plain(ours[key])} and {_plain(theirs[key])}" for key in keys)
    return f": {listed}" if listed else ""


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
