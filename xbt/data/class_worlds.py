"""Worlds of classes: labelled inputs without pictures, on which a small network learns to tell classes apart.

A sample of class c has the latent z = m_c + s ε, with m_c ~ N(0, I) the class's centre, drawn once. What a
model is given is z seen through two random layers, disturbed:

    x = tanh(z A) B + n η,    ε, η ~ N(0, I)

Classes overlap, and a network that was trained on some of them sees the others worse than one that was
trained on all: which is what an update brings.
"""

from __future__ import annotations

from dataclasses import dataclass

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
