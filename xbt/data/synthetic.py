"""Synthetic data without images: labelled inputs for small networks, and vectors of two dual encoders.

**Classes** (:func:`make_class_world`). A sample of class c has the latent z = m_c + s ε. The class centre
m_c ~ N(0, I) is drawn once. The model's input is z after two random layers, plus noise:

    x = tanh(z A) B + n η,    ε, η ~ N(0, I)

Classes overlap. A network trained on some classes is worse on the others than one trained on all, as with a
model update in practice.

**Vectors** (:func:`make_vector_world`): two dual encoders of known quality, without training. A scene is a
latent vector z. A caption contains part of z, with some noise; an image contains all of it. A model maps both
with one random nonlinear map, adds noise, and adds a constant for its modality gap:

    f(x) = normalise(A x + a tanh(B x) + s (√c D w + √(1−c) ε) + g c_modality),   ε ~ N(0, I)

One part of the noise is the model's own (ε). The other part (w) belongs to the text or image, and each model
maps it with its own D, so the errors of two models are correlated. Each model has its own A, B and D. The new
model may also use more of the latent (``reach``) with less noise. So a map between the two spaces can
recover part of the new model's advantage, but not all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError


@dataclass(frozen=True)
class ClassWorld:
    """Labelled training and test samples, sorted by class: (n, dim) float32 inputs and (n,) int64 labels.

    Every class has equally many training samples, and equally many test samples.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def make_class_world(
    n_classes: int = 40,
    train_per_class: int = 60,
    test_per_class: int = 20,
    dim: int = 64,
    latent_dim: int = 16,
    spread: float = 0.75,
    noise: float = 0.5,
    seed: int = 0,
) -> ClassWorld:
    """Draw labelled samples; see the module's description.

    Args:
        n_classes: Number of classes; an old model is trained on the first of them.
        train_per_class: Training samples per class.
        test_per_class: Test samples per class.
        dim: Dimension of the inputs.
        latent_dim: Dimension of the latents z.
        spread: s, spread of a class around its centre, relative to the spread of the centres.
        noise: n, standard deviation of the input noise; the noise-free coordinates are about 1.
        seed: Random seed.

    Raises:
        ConfigError: If a number is too small.
    """
    _require_counts(n_classes=n_classes, train_per_class=train_per_class, test_per_class=test_per_class)
    _require_counts(dim=dim, latent_dim=latent_dim)
    for name, size in (("spread", spread), ("noise", noise)):
        if not 0 <= size < float("inf"):
            raise ConfigError(f"{name} is {size}, but must be a number of at least 0")
    rng = np.random.default_rng(seed)
    hidden = 2 * dim
    centres = rng.normal(size=(n_classes, latent_dim))
    first = rng.normal(size=(latent_dim, hidden)) / latent_dim**0.5
    second = rng.normal(size=(hidden, dim)) / hidden**0.5

    def draw(per_class: int) -> tuple[Tensor, Tensor]:
        labels = np.repeat(np.arange(n_classes), per_class)
        latents = centres[labels] + spread * rng.normal(size=(len(labels), latent_dim))
        seen: NDArray[np.float64] = np.tanh(latents @ first) @ second
        inputs = seen + noise * rng.normal(size=seen.shape)
        return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels)

    train_inputs, train_labels = draw(train_per_class)
    return ClassWorld(train_inputs, train_labels, *draw(test_per_class))


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}, but must be at least 1")


_LATENT = 64
_CAPTIONS = 5
_COMMON = 0.7
"""c, the share of the noise variance that belongs to the item and is common to all models."""


@dataclass(frozen=True)
class ModelQuality:
    """Quality of a synthetic model."""

    dim: int = 48
    reach: int = 32
    """Number of the 64 latent coordinates that it uses."""
    text_noise: float = 1.0
    """Noise of its text vectors, relative to their norm."""
    image_noise: float = 1.0
    """The same for its image vectors."""
    bend: float = 0.3
    """Weight a of the nonlinear part."""
    gap: float = 0.5
    """Norm of the modality gap."""


@dataclass(frozen=True)
class VectorWorld:
    """A corpus of texts and two sets of image–text pairs under both models; all rows are unit vectors."""

    corpus_new: Tensor
    """(n, new_dim) text vectors of the new model."""
    corpus_old: Tensor
    """(n, old_dim) text vectors of the old model for the same texts."""
    support: Mapping[str, Tensor]
    """Pairs for training or selection, with five texts per image, as keyword arguments of
    :class:`xbt.projections.PairVectors`."""
    test: Mapping[str, Tensor]
    """Other pairs for evaluation, in the same format."""


WORLDS: dict[str, tuple[ModelQuality, ModelQuality]] = {
    "much better": (ModelQuality(), ModelQuality(64, 64, 0.5, 0.5)),
    "little better": (ModelQuality(), ModelQuality(64, 36, 0.9, 0.9)),
    "better texts alone": (ModelQuality(), ModelQuality(64, 48, 0.5, 1.6)),
    "no better": (ModelQuality(), ModelQuality(64, 32, 1.0, 1.0)),
    "worse": (ModelQuality(), ModelQuality(64, 24, 2.0, 2.0)),
}
"""Name → (old model, new model)."""


class _Model:
    def __init__(self, quality: ModelQuality, rng: np.random.Generator) -> None:
        self.quality, self.rng = quality, rng
        shape = (quality.reach, quality.dim)
        self.linear, self.bent = (rng.normal(size=shape) / shape[0] ** 0.5 for _ in range(2))
        self.noise_map = rng.normal(size=(_LATENT, shape[1]))
        self.gaps = {modality: self._unit(rng.normal(size=shape[1])) for modality in ("text", "image")}

    def see(self, latent: NDArray[np.float64], nuisance: NDArray[np.float64], modality: str) -> Tensor:
        quality = self.quality
        noise = quality.text_noise if modality == "text" else quality.image_noise
        seen = latent[:, : quality.reach]
        signal = self._unit(seen @ self.linear + quality.bend * np.tanh(seen @ self.bent))
        common = self._unit(nuisance @ self.noise_map)
        private = self._unit(self.rng.normal(size=signal.shape))
        noisy = signal + noise * (_COMMON**0.5 * common + (1 - _COMMON) ** 0.5 * private)
        rows = self._unit(noisy + quality.gap * self.gaps[modality])
        return torch.from_numpy(rows.astype(np.float32))

    @staticmethod
    def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        return unit


def make_vector_world(
    old: ModelQuality,
    new: ModelQuality,
    n_corpus: int = 10_000,
    n_support: int = 300,
    n_test: int = 500,
    seed: int = 0,
) -> VectorWorld:
    """Draw the vectors of two models; see the module's description.

    Args:
        old: The old model.
        new: The new model.
        n_corpus: Number of texts in the corpus.
        n_support: Number of images in ``support``, each with five texts.
        n_test: Number of images in ``test``, each with five texts.
        seed: Random seed; support and test do not depend on ``n_corpus``.

    Raises:
        ConfigError: If a count is below 1, or a model's reach is not between 1 and 64.
    """
    _require_counts(n_corpus=n_corpus, n_support=n_support, n_test=n_test)
    for side, quality in (("old", old), ("new", new)):
        if not 1 <= quality.reach <= _LATENT:
            raise ConfigError(f"the {side} model's reach is {quality.reach}, but must lie in 1 to {_LATENT}")
    models = {
        side: _Model(quality, np.random.default_rng([seed, number]))
        for number, (side, quality) in enumerate((("old", old), ("new", new)))
    }
    draws = np.random.default_rng([seed, 2])
    sets = {}
    for name, count in (("support", n_support), ("test", n_test)):
        images = _latents(draws, count)
        texts = _captions(draws, np.repeat(images, _CAPTIONS, axis=0))
        views = {
            "text": (texts, draws.normal(size=texts.shape)),
            "image": (images, draws.normal(size=images.shape)),
        }
        vectors = {
            f"{side}_{kind}s": model.see(*view, kind)
            for side, model in models.items()
            for kind, view in views.items()
        }
        owner = torch.arange(count).repeat_interleave(_CAPTIONS)
        sets[name] = {**vectors, "image_of_text": owner}
    corpus = _captions(draws, _latents(draws, n_corpus))
    nuisance = draws.normal(size=corpus.shape)
    corpus_new, corpus_old = (models[side].see(corpus, nuisance, "text") for side in ("new", "old"))
    return VectorWorld(corpus_new, corpus_old, sets["support"], sets["test"])


def _latents(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    # Variance decreases as in real spectra, so a model with a smaller reach still captures most of it.
    scale = (1 + np.arange(_LATENT)) ** -0.35
    return rng.normal(size=(count, _LATENT)) * scale


def _captions(rng: np.random.Generator, latents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Latents as captions describe them: 70 % of the coordinates, each with a little noise."""
    kept = rng.random(latents.shape) < 0.7
    return np.where(kept, latents, 0.0) + 0.15 * rng.normal(size=latents.shape)
