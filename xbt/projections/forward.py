"""Forward maps: stored old vectors mapped into the new space, for use when the originals are lost.

Every other map here leaves the stored vectors alone and maps the queries. Where vectors may be rewritten, and
their images or texts are gone so that nothing can be embedded again, the map runs the other way.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections.base import LinearProjection, Modality, Projection
from xbt.projections.closed_form import fit_procrustes
from xbt.projections.pairs import PairVectors
from xbt.projections.ridge import fit_ridge
from xbt.projections.sources import random_access
from xbt.projections.trainer import FitSchedule, Positions, fit_trained
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_vectors, unit_rows

ForwardMethod = Literal["procrustes", "ridge", "fct"]


FCT_SCHEDULE = FitSchedule(steps=500, lr=5e-4, weight_decay=3e-5, eval_every=50)


def fit_forward(
    old: Vectors,
    new: Vectors,
    side: Vectors | None = None,
    *,
    method: ForwardMethod = "procrustes",
    regularisation: float | None = None,
    hidden_dim: int = 512,
    schedule: FitSchedule = FCT_SCHEDULE,
) -> Projection:
    """Fit a map from old vectors, and maybe side information ψ stored beside them, to the new space.

    ``"procrustes"`` is the rotation and ``"ridge"`` the regularised least-squares map of the same names, with
    the roles of both models exchanged. ``"fct"`` starts at the ridge map and trains

        L = mean ‖ h(o, ψ) − z_new ‖²

    with the architecture of :class:`ForwardMap` (FCT; Ramanujan et al., CVPR 2022). A later step is kept only
    for a clear gain on held-out items (:class:`~xbt.projections.trainer.StepSelection`); else the ridge map
    of all items is returned.

    Args:
        old: (n, d_old) vectors of the old model.
        new: (n, d_new) vectors of the new model for the same items.
        side: (n, d_side) side information of the same items.
        method: One of the three; a rotation cannot use side information.
        regularisation: λ of the ridge map; see :func:`~xbt.projections.ridge.fit_ridge`.
        hidden_dim: Width of FCT's mixer; the paper's is 2,048, for 10⁶ items.
        schedule: How to train FCT.

    Returns:
        A projection whose input is the old model's: a matrix, or with side information or ``"fct"`` a
        :class:`ForwardMap`, called as ``forward_map(old, side=side)``. Attach the spaces with
        ``set_spaces(old_space, new_space)``, the one that comes in first.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors are empty, not of the same items, hold NaN, or are too few to train on.
    """
    if method not in get_args(ForwardMethod):
        raise ConfigError(f"forward method {method!r} is not known; there is procrustes, ridge, fct")
    if method == "procrustes" and side is not None:
        raise ConfigError("the method 'procrustes' cannot use side information; use 'ridge' or 'fct'")
    if method == "fct" and hidden_dim < 1:
        raise ConfigError(f"hidden_dim is {hidden_dim}, but the mixer of 'fct' needs a width of at least 1")
    joined, target, side_dim = _joined(old, new, side)
    if method == "procrustes":
        return fit_procrustes(joined, target)

    def ridge(positions: Positions | None) -> LinearProjection:
        chosen = slice(None) if positions is None else positions
        return fit_ridge(joined[chosen], target[chosen], regularisation=regularisation)

    if method == "ridge" and not side_dim:
        return ridge(None)

    def start(positions: Positions | None, pairs: PairVectors | None) -> ForwardMap:
        # The closed form of all items is left without the mixer, which would add nothing.
        width = 0 if positions is None else hidden_dim
        return ForwardMap.from_linear(ridge(positions).weight.detach(), side_dim, width, schedule.seed)

    if method == "ridge":
        return start(None, None).eval()
    return fit_trained(
        random_access(joined, target), start, lambda made, _: _Objective(made), schedule, score=_closeness
    )


def _joined(old: Vectors, new: Vectors, side: Vectors | None) -> tuple[Tensor, Tensor, int]:
    """Old vectors beside their side information, new vectors, and the dimension of the side information."""
    incoming, target = as_vectors(old, "old vectors").float(), as_vectors(new, "new vectors").float()
    extra = incoming[:, :0] if side is None else as_vectors(side, "side information").float()
    for name, rows in (("new vectors", target), ("side information", extra)):
        if len(rows) != len(incoming):
            raise DataError(
                f"there are {len(rows)} rows of {name} for {len(incoming)} old vectors; "
                "give both of the same items"
            )
    return torch.cat([incoming, extra], dim=1), target, extra.shape[1]


class _Objective(nn.Module):
    """The mean squared error of a forward map."""

    def __init__(self, projection: ForwardMap) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        # Batches name the vectors that come in "new" and those that go out "old".
        loss = _errors(self.projection, batch["new"], batch["old"]).mean()
        return loss, {"error": loss.detach()}


def _errors(projection: ForwardMap, joined: Tensor, target: Tensor) -> Tensor:
    """(n,) ‖h − z‖² per item; both are unit rows."""
    return (normalize(projection.mapped(joined), dim=-1) - target).square().sum(dim=1)


@torch.no_grad()
def _closeness(projection: ForwardMap, joined: Tensor, target: Tensor) -> Tensor:
    """(n,) negative errors of held-out items."""
    device = projection.linear.weight.device
    return -_errors(projection, joined.to(device), target.to(device)).cpu()


class ForwardMap(Projection):
    """h(o, ψ) = normalise(W [o ‖ ψ] + M(P₁ o ‖ P₂ ψ)): old vectors and side information to the new space.

    The architecture of forward-compatible training (FCT; Ramanujan et al., "Forward Compatible Training for
    Large-Scale Embedding Retrieval Systems", CVPR 2022): a branch each for the old vector and for the side
    information, d → 2d → 2·new_dim, and a mixer 4·new_dim → hidden → hidden → new_dim. Three things are
    ours. It is a residual beside a linear map, so that step 0 is a closed form. Layers are normalised by
    item and not by batch, so that an item's vector does not depend on what else is in its batch. And without
    side information there is one branch, where FCT puts the old vector into both.

    It is a :class:`Projection` that runs the other way: what comes in are vectors of the *old* model, so that
    ``new_dim`` is the old model's dimension and ``old_dim`` the new one's.

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out.
        side_dim: Dimension of the side information; 0 if there is none.
        hidden_dim: Width of the mixer; 0 leaves the linear map alone.
        new_space: The space of the vectors that come in.
        old_space: The space of those that go out.

    Raises:
        ConfigError: If a width is negative.

    Attributes:
        linear: W, (old_dim, new_dim + side_dim) without offset.
    """

    kind = "forward"

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        side_dim: int = 0,
        hidden_dim: int = 0,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        for name, width in (("side_dim", side_dim), ("hidden_dim", hidden_dim)):
            if width < 0:
                raise ConfigError(f"{name} must not be negative, got {width}; 0 leaves that part out")
        self.side_dim, self.hidden_dim = side_dim, hidden_dim
        self.linear = nn.Linear(new_dim + side_dim, old_dim, bias=False)
        widths = [width for width in (new_dim, side_dim) if width] if hidden_dim else []
        self.branches = nn.ModuleList(
            nn.Sequential(*_layer(width, 2 * width), *_layer(2 * width, 2 * old_dim)) for width in widths
        )
        self.mixer: nn.Sequential | None = None
        if hidden_dim:
            inside = [*_layer(2 * old_dim * len(widths), hidden_dim), *_layer(hidden_dim, hidden_dim)]
            self.mixer = nn.Sequential(*inside, nn.Linear(hidden_dim, old_dim))

    @classmethod
    def from_linear(cls, weight: Tensor, side_dim: int, hidden_dim: int, seed: int) -> ForwardMap:
        """Begins at a linear map; the mixer's last layer is zero.

        Args:
            weight: (old_dim, new_dim + side_dim) matrix.
            side_dim: How many of its columns belong to the side information, the last ones.
            hidden_dim: Width of the mixer.
            seed: Fixes the rest; torch's global generator stays as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(weight.shape[1] - side_dim, weight.shape[0], side_dim, hidden_dim)
        with torch.no_grad():
            made.linear.weight.copy_(weight)
            if made.mixer is not None:
                for parameter in made.mixer[-1].parameters():
                    parameter.zero_()
        return made

    def forward(
        self, vectors: Vectors, modality: Modality | None = None, side: Tensor | None = None
    ) -> Tensor:
        """Maps (n, new_dim) old vectors to (n, old_dim) unit rows of the new model's space.

        Args:
            vectors: (n, new_dim) vectors of the old model.
            modality: Taken for the sake of the contract; there is one map for both.
            side: (n, side_dim) side information of the same items, where the map was fitted with it.

        Raises:
            SpaceMismatchError: If a dimension is not the map's, or side information is missing.
        """
        there = 0 if side is None else side.shape[-1]
        if there != self.side_dim:
            raise SpaceMismatchError(
                f"the map takes side information of dimension {self.side_dim}, got {there}; give what was "
                "stored beside the old vectors, of the kind that the map was fitted with"
            )
        if side is None:
            return super().forward(vectors, modality)
        vectors = self._taken(vectors)
        if vectors.shape != (*side.shape[:-1], self.new_dim):
            raise SpaceMismatchError(
                f"the map takes vectors of dimension {self.new_dim} and as many rows of side information, "
                f"got the shapes {tuple(vectors.shape)} and {tuple(side.shape)}"
            )
        return unit_rows(self.mapped(torch.cat([vectors, side], dim=-1)))

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation; only without side information."""
        return self.mapped(vectors)

    def mapped(self, joined: Tensor) -> Tensor:
        """(n, new_dim + side_dim), old vector then side information → (n, old_dim), not normalised."""
        output: Tensor = self.linear(joined)
        if self.mixer is None:
            return output
        parts = (joined[..., : self.new_dim], joined[..., self.new_dim :])
        branches = [branch(part) for branch, part in zip(self.branches, parts, strict=False)]
        correction: Tensor = self.mixer(torch.cat(branches, dim=-1))
        return output + correction

    def options(self) -> dict[str, Any]:
        """Dimension of the side information, and width of the mixer."""
        return {"side_dim": self.side_dim, "hidden_dim": self.hidden_dim}


def _layer(width: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(width, out), nn.LayerNorm(out), nn.ReLU()
