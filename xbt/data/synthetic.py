"""Worlds of classes: labelled inputs without pictures, on which a small network learns to tell classes apart.

A sample of class c has the latent z = m_c + s ε, with m_c ~ N(0, I) the class's centre, drawn once. What a
model is given is z seen through two random layers, disturbed:

    x = tanh(z A) B + n η,    ε, η ~ N(0, I)

Classes overlap, and a network that was trained on some of them sees the others worse than one that was
trained on all: which is what an update brings.

Worlds of vectors: two dual encoders of known quality, without pictures, words or training.

A scene is a latent vector z. A caption tells part of it, with some noise; an image shows all of it. A model
sees both through one random map, squashed and disturbed, beside a constant that is its modality gap:

    f(x) = normalise(A x + a tanh(B x) + s (√c D w + √(1−c) ε) + g c_modality),   ε ~ N(0, I)

The disturbance is in part a model's own (ε) and in part lies in the text or image (w), where every model sees
it, each in its own way (D): two models err together. The new model has other A, B and D than the old one, and
may see more of the latent (``reach``) with less disturbance (``noise``). What a map between the two can
recover is thereby neither all nor nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError


@dataclass(frozen=True)
class ClassWorld:
    """Labelled samples to train and to test on; classes come one after another, with equal counts.

    Attributes:
        train_inputs: (n_classes · train_per_class, dim) float32.
        train_labels: (n_classes · train_per_class,) int64.
        test_inputs: (n_classes · test_per_class, dim) float32.
        test_labels: (n_classes · test_per_class,) int64.
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
    """Draws a world.

    Args:
        n_classes: Classes; an old model is trained on the first of them.
        train_per_class: Samples of each to train on.
        test_per_class: Samples of each to test on.
        dim: Dimension of the inputs.
        latent_dim: Dimension of the latents z.
        spread: s, how far a class's samples lie from its centre, in units of what lies between centres.
        noise: n, disturbance of the inputs, whose coordinates are else about 1.
        seed: Fixes the world.

    Raises:
        ConfigError: If a number is too small.
    """
    counts = {
        "n_classes": n_classes,
        "train_per_class": train_per_class,
        "test_per_class": test_per_class,
        "dim": dim,
        "latent_dim": latent_dim,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}, but must be at least 1")
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


_LATENT = 64
_CAPTIONS = 5
_COMMON = 0.7
"""c, the share of the disturbance that lies in the item."""


@dataclass(frozen=True)
class ModelQuality:
    """How well a model of a vector world sees.

    Attributes:
        dim: Dimension of its vectors.
        reach: How many of the 64 latent coordinates it sees.
        text_noise: Disturbance of its text vectors, as a share of their length.
        image_noise: Disturbance of its image vectors, likewise.
        bend: Share of the nonlinear part a.
        gap: Length of the modality gap.
    """

    dim: int = 48
    reach: int = 32
    text_noise: float = 1.0
    image_noise: float = 1.0
    bend: float = 0.3
    gap: float = 0.5


@dataclass(frozen=True)
class VectorWorld:
    """A corpus of texts and two sets of image–text pairs under both models; all rows are unit vectors.

    Attributes:
        corpus_new: (n, new_dim) text vectors of the new model.
        corpus_old: (n, old_dim) of the old model for the same texts.
        support: Pairs to choose or to learn by, as the keyword arguments of
            :class:`xbt.projections.PairVectors`: five texts an image.
        test: Other pairs, to measure on.
    """

    corpus_new: Tensor
    corpus_old: Tensor
    support: Mapping[str, Tensor]
    test: Mapping[str, Tensor]


WORLDS: dict[str, tuple[ModelQuality, ModelQuality]] = {
    "much better": (ModelQuality(), ModelQuality(64, 64, 0.5, 0.5)),
    "little better": (ModelQuality(), ModelQuality(64, 36, 0.9, 0.9)),
    "better texts alone": (ModelQuality(), ModelQuality(64, 48, 0.5, 1.6)),
    "no better": (ModelQuality(), ModelQuality(64, 32, 1.0, 1.0)),
    "worse": (ModelQuality(), ModelQuality(64, 24, 2.0, 2.0)),
}
"""Name → old and new model."""


@dataclass
class _Model:
    quality: ModelQuality
    rng: np.random.Generator
    linear: NDArray[np.float64] = field(init=False)
    bent: NDArray[np.float64] = field(init=False)
    disturbing: NDArray[np.float64] = field(init=False)
    gaps: dict[str, NDArray[np.float64]] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.quality.reach, self.quality.dim)
        self.linear, self.bent = (self.rng.normal(size=shape) / shape[0] ** 0.5 for _ in range(2))
        self.disturbing = self.rng.normal(size=(_LATENT, shape[1]))
        self.gaps = {each: self._unit(self.rng.normal(size=shape[1])) for each in ("text", "image")}

    def see(self, latent: NDArray[np.float64], nuisance: NDArray[np.float64], modality: str) -> Tensor:
        quality = self.quality
        noise = quality.text_noise if modality == "text" else quality.image_noise
        seen = latent[:, : quality.reach]
        signal = self._unit(seen @ self.linear + quality.bend * np.tanh(seen @ self.bent))
        common = self._unit(nuisance @ self.disturbing)
        own = self._unit(self.rng.normal(size=signal.shape))
        disturbed = signal + noise * (_COMMON**0.5 * common + (1 - _COMMON) ** 0.5 * own)
        rows = self._unit(disturbed + quality.gap * self.gaps[modality])
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
    """Draws a world.

    Args:
        old: The old model.
        new: The new model.
        n_corpus: Texts of the corpus.
        n_support: Images to choose by, each with five texts.
        n_test: Images to measure on, likewise.
        seed: Fixes the world; support and test do not depend on the size of the corpus.

    Raises:
        ConfigError: If a count is below 1, or a model reaches further than the latent.
    """
    for name, count in (("n_corpus", n_corpus), ("n_support", n_support), ("n_test", n_test)):
        if count < 1:
            raise ConfigError(f"{name} is {count}, but must be at least 1")
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
    # What matters most comes first, as in real spectra, so that a model of less reach still sees most.
    scale = (1 + np.arange(_LATENT)) ** -0.35
    return rng.normal(size=(count, _LATENT)) * scale


def _captions(rng: np.random.Generator, latents: NDArray[np.float64]) -> NDArray[np.float64]:
    """What captions tell: most coordinates, and each a little wrong."""
    told = rng.random(latents.shape) < 0.7
    return np.where(told, latents, 0.0) + 0.15 * rng.normal(size=latents.shape)
