"""BCT and OCA heads and losses, and the head of independent models, which are the baseline."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from xbt.heads.base import CompatibleHead, HeadOutput, require_at_least, require_dims
from xbt.heads.losses import HeadLoss, Prototypes, Targets
from xbt.heads.orthogonal import orthogonal_linear


class BCTHead(CompatibleHead):
    """h of unit length, whose leading coordinates are compatible; logits = W h.

    Shen et al., "Towards backward-compatible representation learning", CVPR 2020, arXiv 2003.11942. With
    ``extra_dims`` it is the naive way to add dimensions for the new model, a baseline of BT².

    Args:
        new_dim: Dimension of the new vectors.
        old_dim: Dimension of the old model's vectors.
        extra_dims: Dimensions added to ``new_dim``.
        n_classes: Classes of the classifier; ``None`` for no classifier.

    Raises:
        ConfigError: If a number is too small, or there are fewer dimensions than the old vectors have.
    """

    kind = "bct"
    paper = (
        'BCT (Shen et al., "Towards backward-compatible representation learning", CVPR 2020, '
        "[arXiv 2003.11942](https://arxiv.org/abs/2003.11942))."
    )

    def __init__(self, new_dim: int, old_dim: int, extra_dims: int = 0, n_classes: int | None = None) -> None:
        require_dims(new_dim, old_dim, extra_dims)
        dim = new_dim + extra_dims
        super().__init__(in_dim=dim, old_dim=old_dim, out_dim=dim, feature_dim=dim, n_classes=n_classes)
        self.new_dim, self.extra_dims = new_dim, extra_dims


class BCTLoss(HeadLoss):
    """L = w_cls · CE(W h, y) + w_infl · CE(u · pᵀ, y), where u is the compatible part as a unit vector.

    p are the old model's class means for all classes of the new data ("pseudo classifier"); see
    :func:`~xbt.heads.losses.influence` for why there is no temperature. Both terms are label-smoothed. The
    weights 1 and 10 are those of BT²'s code for its baseline.

    Args:
        prototypes: p.
        influence_weight: w_infl.
        classification_weight: w_cls.
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        ConfigError: If a weight or the smoothing cannot be used.
    """

    def __init__(
        self,
        prototypes: Prototypes,
        influence_weight: float = 10.0,
        classification_weight: float = 1.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(
            prototypes,
            label_smoothing,
            influence_weight=influence_weight,
            classification_weight=classification_weight,
        )

    def parts(self, output: HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """The parts ``classification`` and ``influence``."""
        return self.old_parts(output, targets.labels)[1]


class OCAHead(CompatibleHead):
    """h of unit length with ``old_dim + extra_dims`` coordinates, the leading ones compatible.

        logits = W T h,    T orthogonal;    galleries store h

    Ricci, Biondi, Pernici, Del Bimbo, "Backward-compatible aligned representations via an orthogonal
    transformation layer", ECCV 2024 workshops, arXiv 2408.08793. T is square and orthogonal, so T h and h
    have the same angles, and W T is a matrix like W: T changes only the optimisation, not the functions that
    can be learned. ``orthogonal=False`` leaves it out; measure the effect. T has no bias here. The authors'
    code has one, which preserves distances but not angles.

    Args:
        old_dim: Dimension of the old model's vectors.
        extra_dims: Dimensions added to it.
        orthogonal: Use T.
        n_classes: Classes of the classifier; ``None`` for no classifier.
        orthogonal_map: Parametrisation of T; see :func:`~xbt.heads.orthogonal.orthogonal_linear`.

    Raises:
        ConfigError: If a number is too small or the map is not known.
    """

    kind = "oca"
    paper = (
        'OCA (Ricci et al., "Backward-compatible aligned representations via an orthogonal transformation '
        'layer", ECCV 2024 workshops, [arXiv 2408.08793](https://arxiv.org/abs/2408.08793)).'
    )

    def __init__(
        self,
        old_dim: int,
        extra_dims: int,
        orthogonal: bool = True,
        n_classes: int | None = None,
        orthogonal_map: str = "matrix_exp",
    ) -> None:
        require_at_least(1, old_dim=old_dim)
        require_at_least(0, extra_dims=extra_dims)
        dim = old_dim + extra_dims
        super().__init__(in_dim=dim, old_dim=old_dim, out_dim=dim, feature_dim=dim, n_classes=n_classes)
        self.extra_dims, self.orthogonal, self.orthogonal_map = extra_dims, orthogonal, orthogonal_map
        rotation = orthogonal_linear(dim, orthogonal_map)  # refuses unknown maps even if T is not used
        self.rotation = rotation if orthogonal else None

    def embedded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`CompatibleHead.embedded`; T is dropped with the classifier by :meth:`fold`."""
        unit = normalize(features, dim=1)
        return (unit if self.rotation is None else self.rotation(unit)), unit


class OCALoss(HeadLoss):
    """L = w_cls · CE(W T h, y) + w_infl · CE(u · pᵀ, y) + w_proto · (1 − mean cos(p_y, u)).

    u is the compatible part as a unit vector and p the old model's class means; the weights 5, 10 and 5 are
    those of the authors' code. Both cross entropies are label-smoothed and neither has a temperature; see
    :func:`~xbt.heads.losses.influence`. The old model is needed only for the prototypes.

    Args:
        prototypes: p.
        classification_weight: w_cls.
        influence_weight: w_infl.
        prototype_weight: w_proto.
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        ConfigError: If a weight or the smoothing cannot be used.
    """

    def __init__(
        self,
        prototypes: Prototypes,
        classification_weight: float = 5.0,
        influence_weight: float = 10.0,
        prototype_weight: float = 5.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(
            prototypes,
            label_smoothing,
            classification_weight=classification_weight,
            influence_weight=influence_weight,
            prototype_weight=prototype_weight,
        )

    def parts(self, output: HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """The parts ``classification``, ``influence`` and ``prototype``."""
        direction, parts = self.old_parts(output, targets.labels)
        assert self.prototypes is not None
        own = self.prototypes.present[self.prototypes.columns(targets.labels)]
        return {**parts, "prototype": 1 - cosine_similarity(direction, own, dim=1).mean()}


class PlainHead(CompatibleHead):
    """f = h / ‖h‖, logits = W f: the old model φ_old, and the independent new one φ'_new.

    It is compatible with no old model: ``old_dim`` is 0 and ``compatible`` is ``None``.

    Args:
        dim: Dimension of the features and of the vectors.
        n_classes: Classes of the classifier; ``None`` for no classifier.

    Raises:
        ConfigError: If a number is too small.
    """

    kind = "independent"
    paper = "A plain classifier's head, compatible with no other model."

    def __init__(self, dim: int, n_classes: int | None = None) -> None:
        require_at_least(1, dim=dim)
        super().__init__(in_dim=dim, old_dim=0, out_dim=dim, feature_dim=dim, n_classes=n_classes)
        self.dim = dim


class ClassificationLoss(HeadLoss):
    """L = CE(W f, y), with label smoothing.

    Args:
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        ConfigError: If it does not lie in [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        super().__init__(None, label_smoothing, classification_weight=1.0)

    def parts(self, output: HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """The part ``classification``."""
        return {"classification": self.classification(output, targets.labels)}
