"""BT² head and loss: two learned rotations put the compatible part first and keep the new features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.errors import ConfigError
from xbt.heads.base import CompatibleHead, FoldedHead, HeadOutput, require_dims
from xbt.heads.losses import HeadLoss, Prototypes, Targets, matching
from xbt.heads.orthogonal import (
    assign,
    checked_map,
    checked_order,
    complement,
    nearest_orthonormal,
    orthogonal_linear,
)


class BT2Head(CompatibleHead):
    """BT² head: rotates the new features, together with k dimensions for the old model.

    Zhou et al., "BT²: Backward-compatible training with basis transformation", ICCV 2023, arXiv 2211.03989.
    For features h of ``new_dim + old_dim`` coordinates, k extra dimensions and the scale C:

        f = unit(h[:new_dim])                      input of the classifier; near φ'_new
        o = unit(A relu(h) + a) ∈ R^k              information of the old model that f lacks
        z = [o; P C f]
        compatible = Q z[:old_dim]                 near φ_old
        full = [compatible; z[old_dim:]] ∈ R^(new_dim + k)

    P and Q are orthogonal. So ‖full‖ = √(1 + C²) for every input (C for k = 0), f can be recovered from the
    full vector (:meth:`unrotate`), and ⟨full(x), full(y)⟩ = ⟨o(x), o(y)⟩ + C² ⟨f(x), f(y)⟩: C weights the
    new model's angles among new vectors.

    Args:
        new_dim: Dimension of the independent new model's vectors.
        old_dim: Dimension of the old model's vectors.
        extra_dims: k, added to ``new_dim``; at most ``old_dim``.
        scale: C.
        n_classes: Classes of the classifier; ``None`` for no classifier.
        orthogonal_map: Parametrisation of P and Q; see :func:`~xbt.heads.orthogonal.orthogonal_linear`.

    Raises:
        ConfigError: If a number cannot be used, the shapes do not fit, or the map is not known.
    """

    kind = "bt2"
    paper = (
        'BT² (Zhou et al., "BT²: Backward-compatible training with basis transformation", ICCV 2023, '
        "[arXiv 2211.03989](https://arxiv.org/abs/2211.03989))."
    )

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        extra_dims: int,
        scale: float = 2.0,
        n_classes: int | None = None,
        orthogonal_map: str = "matrix_exp",
    ) -> None:
        require_dims(new_dim, old_dim, extra_dims)
        if extra_dims > old_dim:
            raise ConfigError(
                f"extra_dims {extra_dims} is more than the {old_dim} dimensions of the old vectors; "
                f"take at most {old_dim}"
            )
        if not 0 < scale < math.inf:
            raise ConfigError(f"scale must be a number above 0, got {scale}")
        super().__init__(
            in_dim=new_dim + old_dim,
            old_dim=old_dim,
            out_dim=new_dim + extra_dims,
            feature_dim=new_dim,
            n_classes=n_classes,
        )
        self.new_dim, self.extra_dims = new_dim, extra_dims
        self.scale, self.orthogonal_map = float(scale), orthogonal_map
        self.code = nn.Linear(self.in_dim, extra_dims) if extra_dims else None
        self.new_rotation = orthogonal_linear(new_dim, orthogonal_map)
        self.old_rotation = orthogonal_linear(old_dim, orthogonal_map)

    def embedded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`CompatibleHead.embedded`."""
        unit = normalize(features[:, : self.new_dim], dim=1)
        mixed = self.new_rotation(self.scale * unit)
        if self.code is not None:
            mixed = torch.cat([normalize(self.code(features.relu()), dim=1), mixed], dim=1)
        compatible = self.old_rotation(mixed[:, : self.old_dim])
        return unit, torch.cat([compatible, mixed[:, self.old_dim :]], dim=1)

    def unrotate(self, full: Tensor) -> Tensor:
        """Recover f from full vectors.

        Args:
            full: (n, out_dim) rows of ``HeadOutput.full`` (not normalised).

        Returns:
            (n, new_dim) unit rows f, exact up to rounding.
        """
        first = full[:, : self.old_dim] @ self.old_rotation.weight
        mixed = torch.cat([first, full[:, self.old_dim :]], dim=1)
        return mixed[:, self.extra_dims :] @ self.new_rotation.weight / self.scale

    @torch.no_grad()
    def fold(self) -> FoldedHead:
        """See :meth:`CompatibleHead.fold`: M = [Q, I] [I, C P] with each pair on a diagonal."""
        new, old = self.scale * self.new_rotation.weight.double(), self.old_rotation.weight.double()
        inner = torch.eye(self.out_dim).to(new)
        inner[self.extra_dims :, self.extra_dims :] = new
        matrix = torch.cat([old @ inner[: self.old_dim], inner[self.old_dim :]]).to(self.old_rotation.weight)
        code = None if self.code is None else (self.code.weight, self.code.bias)
        return FoldedHead(self.in_dim, self.old_dim, self.new_dim, matrix, code)

    @torch.no_grad()
    def init_from(self, weight: Tensor, order: Tensor | None = None) -> Tensor:
        """See :meth:`CompatibleHead.init_from`.

        With the order U, Q = U, and the leading rows of P are the last rows of Uᵀ W (made orthonormal if they
        are not). So ``compatible`` is W x in all but the k least important directions. There o, which always
        has length 1, also starts at the direction of W x, for as many directions as pairs of the remaining
        features can carry a sign through the ReLU.

        Raises:
            ConfigError: Also if ``weight`` does not map from ``new_dim`` dimensions.
        """
        target = checked_map(weight, self.old_dim)
        if target.shape[1] != self.new_dim:
            raise ConfigError(
                f"the initial map takes {target.shape[1]} dimensions, but the head's new_dim is "
                f"{self.new_dim}"
            )
        basis = checked_order(order, target)
        rotated = basis.T @ target
        leading = nearest_orthonormal(rotated[self.extra_dims :])
        assign(self.old_rotation, basis.float())
        assign(self.new_rotation, torch.cat([leading, complement(leading)]).float())
        start = torch.zeros(self.in_dim, self.new_dim)
        start[: self.new_dim] = torch.eye(self.new_dim)
        if self.code is not None:
            start[self.new_dim :] = self._init_code(self.code, rotated[: self.extra_dims].float())
        return start

    def _init_code(self, code: nn.Linear, target: Tensor) -> Tensor:
        """Initialise o at the direction of ``target @ x``, and return the rows of E that carry it."""
        rows = torch.zeros(self.old_dim, self.new_dim)
        code.weight.zero_()
        code.bias.zero_()
        carried = min(self.extra_dims, self.old_dim // 2)
        first = self.extra_dims - carried  # the most important directions
        if not bool((target[first:].norm(dim=1) > 1e-6).any()):
            code.bias.fill_(1.0)  # there is nothing to carry, so avoid the direction of rounding errors
            return rows
        rows[:carried], rows[carried : 2 * carried] = target[first:], -target[first:]
        diagonal = torch.arange(carried, device=code.weight.device)
        code.weight[first + diagonal, self.new_dim + diagonal] = 1.0
        code.weight[first + diagonal, self.new_dim + carried + diagonal] = -1.0
        return rows


class BT2Loss(HeadLoss):
    """The loss of BT², with b the compatible part as a unit vector.

        L = w_cls · CE(W f, y) + λ1 · (1 − mean cos(φ'_new(x), f))
            + λ2 · CE(b · pᵀ, y) + λ3 · (1 − mean cos(φ_old(x), b))

    λ1 = 1, λ2 = 10, λ3 = 5 in the authors' code. With little data λ1 = 1 leaves f far from φ'_new, and λ1 = 5
    is better. There is neither label smoothing nor a temperature; see
    :func:`~xbt.heads.losses.influence`.

    Args:
        prototypes: p, the old model's class means.
        classification_weight: w_cls.
        new_weight: λ1; with 0 the targets need no ``new``.
        influence_weight: λ2.
        old_weight: λ3; with 0 the targets need no ``old``.

    Raises:
        ConfigError: If a weight cannot be used.
    """

    new_weight: float
    old_weight: float

    def __init__(
        self,
        prototypes: Prototypes,
        classification_weight: float = 1.0,
        new_weight: float = 1.0,
        influence_weight: float = 10.0,
        old_weight: float = 5.0,
    ) -> None:
        super().__init__(
            prototypes,
            0.0,
            classification_weight=classification_weight,
            new_weight=new_weight,
            influence_weight=influence_weight,
            old_weight=old_weight,
        )

    def parts(self, output: HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """The parts ``classification``, ``influence``, ``new`` and ``old``, the last two where they count."""
        direction, parts = self.old_parts(output, targets.labels)
        if self.new_weight:
            parts["new"] = matching(output.features, targets.new, "new")
        if self.old_weight:
            parts["old"] = matching(direction, targets.old, "old")
        return parts
