"""Tuning of the combined query on labelled pairs: two small matrices on top of a projection.

The old query u and the projected new one v of a pair are fixed; what is learned is

    q = normalise((1−β) u + β v + A u + B v),   A and B (old_dim × old_dim), zero at first,

the same for both directions, by L-BFGS on

    CE(⟨q_text, old images⟩ / τ) + InfoNCE(⟨q_image, old texts⟩ / τ) + λ · 4 (‖A‖² + ‖B‖²) / old_dim,

whose second term adds up the probabilities of all the texts of an image, as MIL-NCE does (Miech et al.,
"End-to-End Learning of Visual Representations from Uncurated Instructional Videos", CVPR 2020). The gallery
is the old model's and stays. Step 0 is the weighted mean of both queries; the penalty is heavy, because a few
hundred pairs must not undo what a corpus of texts has said.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import normalize

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.combinations import Linear
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.ensemble_fit import projected_queries
from xbt.projections.pairs import PairVectors

LOGIT_BYTES = 4 * 2**20
"""Most memory that logits take; the gradient of more pairs is added up piece by piece."""

_HISTORY = 8


def tune_on_pairs(
    projection: Projection,
    pairs: PairVectors,
    *,
    use_old: bool = True,
    penalty: float = 30.0,
    temperature: float = 0.05,
    steps: int = 12,
    beta: float | Mapping[str, float] = 0.5,
) -> QueryEnsemble | LinearProjection:
    """Learns how queries are best put to the old gallery, from pairs of images and texts.

    Everything is computed from vectors, on the CPU and without chance. The gradient is that of all pairs.

    Args:
        projection: The map from the new space to the old one; it is not changed.
        pairs: What is learned from; without new image vectors only T2I is.
        use_old: Whether the old query takes part. Without it there is no A and β is 1.
        penalty: λ; the larger, the nearer the result stays to where it began.
        temperature: τ.
        steps: Most steps of L-BFGS; the default comes within a thousandth of the minimum.
        beta: Share of the new query in the mean, one for both directions or one for each of the pairs'.

    Returns:
        A :class:`QueryEnsemble` with the linear combination for the pairs' directions. Without the old query,
        and if the projection is a matrix W alone, the :class:`LinearProjection` (I + B) W instead, which does
        the same and can be folded into the encoder.

    Raises:
        ConfigError: If an option is out of its range, or ``beta`` lacks a direction of the pairs.
        SpaceMismatchError: If the projection is not between the dimensions of the pairs.
    """
    shares = _shares(pairs, beta if use_old else 1.0)
    matrices = tune_matrices(
        projection, pairs, use_old=use_old, penalty=penalty, temperature=temperature, steps=steps, beta=beta
    )
    if not use_old and isinstance(projection, LinearProjection) and projection.foldable:
        return folded(projection, matrices["new_matrix"])
    return QueryEnsemble(
        pairs.dims[1],
        {direction: Linear(share, with_old=use_old) for direction, share in shares.items()},
        dict.fromkeys(shares, matrices),
        projection.old_space,
    )


def folded(projection: LinearProjection, new_matrix: Tensor) -> LinearProjection:
    """The projection (I + B) W, which does what W does with the (old_dim, old_dim) matrix B after it."""
    weight = projection.weight.detach().cpu()
    tuned = LinearProjection.from_weight(weight + new_matrix @ weight)
    tuned.set_spaces(projection.new_space, projection.old_space)
    return tuned


def tune_matrices(
    projection: Projection,
    pairs: PairVectors,
    *,
    use_old: bool = True,
    penalty: float = 30.0,
    temperature: float = 0.05,
    steps: int = 12,
    beta: float | Mapping[str, float] = 0.5,
) -> dict[str, Tensor]:
    """The matrices of :func:`tune_on_pairs`, which takes the same arguments and raises the same errors.

    Returns:
        (old_dim, old_dim) float32 ``"new_matrix"`` B and, with ``use_old``, ``"old_matrix"`` A.
    """
    if not (penalty >= 0 and temperature > 0 and steps >= 0):
        raise ConfigError(
            f"pair tuning was given penalty {penalty}, temperature {temperature} and steps {steps}; penalty "
            "and steps must be at least 0, temperature greater than 0"
        )
    shares = _shares(pairs, beta if use_old else 1.0)
    queries = {
        direction: (pairs.queries(direction)[1], normalize(projected_queries(projection, pairs, direction)))
        for direction in pairs.directions
    }
    dim = pairs.dims[1]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        matrices, value = list(torch.from_numpy(flat).float().view(-1, dim, dim)), 0.0
        for each in matrices:
            each.grad = each * (penalty * 8 / dim)
            value += penalty * 4 / dim * each.square().sum().item()
        for direction, (old, new) in queries.items():
            value += _add_gradient(pairs, direction, old, new, shares[direction], matrices, temperature)
        return value, np.concatenate([each.grad.flatten().double() for each in matrices])

    found = np.zeros((2 if use_old else 1) * dim**2)
    if steps:
        options = {"maxiter": steps, "maxcor": _HISTORY}
        # torch's own L-BFGS would load its compiler first, for seconds.
        # The caller may have set autocast to half precision.
        with torch.autocast("cpu", enabled=False):
            found = minimize(loss, found, jac=True, method="L-BFGS-B", options=options).x
    matrices = torch.from_numpy(found).float().view(-1, dim, dim)
    return dict(zip(("new_matrix", "old_matrix"), matrices, strict=False))


@torch.no_grad()
def _add_gradient(
    pairs: PairVectors,
    direction: str,
    old: Tensor,
    new: Tensor,
    share: float,
    matrices: list[Tensor],
    temperature: float,
) -> float:
    """Adds the gradient of one direction's contrastive term to that of the matrices; returns the term.

    It is written out, in blocks that fit the processor's cache: automatic differentiation takes three times
    as long.
    """
    gallery, answers = pairs.gallery(direction), pairs.searched(direction).answers
    value, rows = 0.0, max(1, LOGIT_BYTES // (gallery.element_size() * len(gallery)))
    for start in range(0, len(old), rows):
        part = slice(start, start + rows)
        u, v = old[part], new[part]
        mixed = (1 - share) * u + share * v + v @ matrices[0].T
        if len(matrices) > 1:
            mixed += u @ matrices[1].T
        lengths = mixed.norm(dim=1, keepdim=True).clamp_min(1e-12)
        queries = mixed / lengths
        logs = ((queries / temperature) @ gallery.T).log_softmax(dim=1)
        chosen = answers[part].clamp_min(0)
        right = logs.gather(1, chosen).masked_fill(answers[part] < 0, -torch.inf)
        of_right = right.logsumexp(dim=1, keepdim=True)
        value -= of_right.sum().item() / len(old)
        # The gradient of the logits: all probabilities, less those among the answers.
        of_logits = logs.exp_().scatter_add_(1, chosen, -(right - of_right).exp())
        of_queries = (of_logits @ gallery) / (temperature * len(old))
        along = (of_queries * queries).sum(dim=1, keepdim=True)
        of_mixed = (of_queries - along * queries) / lengths
        for matrix, side in zip(matrices, (v, u), strict=False):
            assert matrix.grad is not None
            matrix.grad += of_mixed.T @ side
    return value


def _shares(pairs: PairVectors, beta: float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(beta, Mapping):
        missing = [direction for direction in pairs.directions if direction not in beta]
        if missing:
            raise ConfigError(f"beta has no value for {' and '.join(missing)}; give one per direction")
        return {direction: float(beta[direction]) for direction in pairs.directions}
    return dict.fromkeys(pairs.directions, float(beta))
