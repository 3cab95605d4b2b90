"""Caption forward map: an estimate of the new vector of a stored row from the captions next to it.

A row of the gallery has an old vector g and no new one. Captions that both models have embedded are anchors:
anchor i has an old vector oᵢ and a new vector nᵢ. Of the k anchors nearest to g,

    wᵢ ∝ exp(⟨g, oᵢ⟩ / τ),   plain:     f(g) = normalise(Σᵢ wᵢ nᵢ)
                             residual:  f(g) = normalise(L g + Σᵢ wᵢ (nᵢ − L oᵢ))

L is the rotation from the old space to the new one. f(g) lies in the new space and is used beside g:

    score(q, g) = (1 − a) ⟨q, g⟩ + a ⟨q_new, f(g)⟩

q is the unit query in the old space, projected or mixed, and q_new the query as the new model made it. No
image is embedded again, and no image–text pair is needed. The idea is that of kernel regression (Nadaraya
1964; Watson 1964) with neighbours as in kNN-LM (Khandelwal et al., ICLR 2020). Anchors may be images that
were embedded again, too: a backfill that is under way improves the estimate of what it has not yet reached.

Cost: 2 · rows · anchors · old_dim floating-point operations, once per row, in blocks whose scores take 16
MiB; a million rows beside 30,000 anchors of 512 dimensions are 3·10¹³, about ten minutes of one CPU core.

``recipes/benchmarks/gallery_steps.py`` measures it, together with the hubness bias, on held-out data; README
shows the table. With few captions the plain form can do harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections.base import Modality, Projection
from xbt.projections.closed_form import procrustes_rotation
from xbt.projections.hubness import nearest
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_vectors, unit_rows

MIN_ANCHORS = 3_000
"""Fewest captions with which the plain form is deployed without evidence: with fewer it can do harm."""


@dataclass(frozen=True)
class Neighbours:
    """Settings of the estimate for rows of one modality.

    Attributes:
        k: How many of the nearest anchors take part.
        temperature: τ of their weights; the smaller, the more the nearest counts.
        residual: Whether neighbours correct the rotation in place of giving the estimate alone. It is the
            safer form with few captions.

    Raises:
        ConfigError: If a number is not positive.
    """

    k: int = 50
    temperature: float = 0.05
    residual: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.k, int) and not isinstance(self.k, bool)
        if not whole or self.k < 1 or not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"the caption forward map was given k={self.k!r} and temperature={self.temperature!r}; k "
                "must be an integer of at least 1 and the temperature a positive number"
            )


class CaptionForwardMap(Projection):
    """Map from old vectors to estimates of the new ones by their nearest captions; see the module.

    It is a :class:`Projection` that runs the other way, like
    :class:`~xbt.projections.forward.ForwardMap`: what comes in are vectors of the *old* model, so that
    ``new_dim`` is the old model's dimension and ``old_dim`` the new one's.

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out.
        count: Number of anchors.
        rules: Settings for rows that are images (``"image"``) and texts (``"text"``).
        new_space: The space of the vectors that come in.
        old_space: The space of those that go out.

    Attributes:
        anchors: (count, new_dim) unit rows of the old model.
        targets: (count, old_dim) unit rows of the new model for the same items.
        rotation: (old_dim, new_dim) matrix L of the residual form.
        owners: (count,) int64, what each anchor belongs to, -1 for nothing; a row of the same owner does not
            see the anchor.

    Raises:
        ConfigError: If there are no anchors, or the rules are not those of images and texts.
    """

    kind = "caption_forward"

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        count: int,
        rules: Mapping[str, Neighbours | Mapping[str, Any]] | None = None,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        if count < 1:
            raise ConfigError(f"a caption forward map needs at least one anchor, not {count}")
        given = dict(rules or {})
        if set(given) - set(get_args(Modality)):
            raise ConfigError(f"the rules are for 'image' and 'text', not for {sorted(given)}")
        self.rules: dict[str, Neighbours] = {}
        for modality in get_args(Modality):
            rule = given.get(modality, Neighbours())
            self.rules[modality] = rule if isinstance(rule, Neighbours) else Neighbours(**rule)
        self.anchors, self.targets, self.rotation = (
            nn.Parameter(torch.zeros(shape), requires_grad=False)
            for shape in ((count, new_dim), (count, old_dim), (old_dim, new_dim))
        )
        self.owners: Tensor
        self.register_buffer("owners", torch.full((count,), -1, dtype=torch.int64))

    def options(self) -> dict[str, Any]:
        """Number of anchors, and the settings by modality."""
        rules = {modality: asdict(rule) for modality, rule in self.rules.items()}
        return {"count": len(self.anchors), "rules": rules}

    def forward(
        self, vectors: Vectors, modality: Modality | None = None, own: Tensor | None = None
    ) -> Tensor:
        """Estimates f(g) of rows of the gallery.

        Args:
            vectors: (m, new_dim) old vectors of the rows.
            modality: What the rows are; ``None`` is taken as texts.
            own: (m,) or (m, e) int64 owners of every row, -1 for none: their anchors are left out. It is for
                judging on rows whose own captions are among the anchors.

        Returns:
            (m, old_dim) unit rows in the new space.

        Raises:
            DataError: If a value is NaN or infinite.
            SpaceMismatchError: If the dimension is not ``new_dim``.
        """
        if own is None:
            return super().forward(vectors, modality)
        rule = self.rules[modality or "text"]
        rows = unit_rows(self._taken(vectors))
        return unit_rows(self.estimate(rows, *self.neighbours(rows, rule.k, own), rule))

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(m, new_dim) → (m, old_dim), before normalisation."""
        rule = self.rules[modality or "text"]
        flat = unit_rows(vectors).reshape(-1, self.new_dim)
        mapped = self.estimate(flat, *self.neighbours(flat, rule.k), rule)
        return mapped.reshape(*vectors.shape[:-1], self.old_dim)

    def neighbours(self, rows: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k nearest anchors of every row, exactly.

        Args:
            rows: (m, new_dim) unit rows.
            k: How many; all anchors if there are fewer.
            own: (m,) or (m, e) owners of the rows, whose anchors are left out.

        Returns:
            (m, k) cosines, highest first and -∞ where anchors were left out, and (m, k) int64 positions.
        """
        return nearest(rows, self.anchors, k, own, self.owners)

    def estimate(self, rows: Tensor, cosines: Tensor, found: Tensor, rule: Neighbours) -> Tensor:
        """Average the neighbours' new vectors, or their corrections of the rotation.

        Args:
            rows: (m, new_dim) unit rows.
            cosines: (m, at least k) cosines of :meth:`neighbours`.
            found: (m, at least k) their positions.
            rule: The settings.

        Returns:
            (m, old_dim) rows, before normalisation.
        """
        if len(rows) == 0:
            return rows.new_zeros(0, self.old_dim)
        cosines, found = cosines[:, : rule.k], found[:, : rule.k]
        # A row all of whose anchors were left out has no neighbours, and no weights.
        weights = torch.softmax(cosines / rule.temperature, dim=1).nan_to_num(0.0)
        mean = embedding_bag(found, self.targets, per_sample_weights=weights.to(rows.dtype), mode="sum")
        if not rule.residual:
            return mean
        around = embedding_bag(found, self.anchors, per_sample_weights=weights, mode="sum")
        return mean + (rows - around) @ self.rotation.T

    @torch.no_grad()
    def rewritten(
        self, vectors: Vectors, projection: Projection, share: float, modality: Modality | None = None
    ) -> Tensor:
        """Rows of the old dimension that replace the stored ones: one vector a row, as before.

        Each is normalise((1 − a) g + a φ(f(g))). It gains less than scoring f(g) beside g.

        Args:
            vectors: (m, new_dim) old vectors of the rows.
            projection: φ, from the new space to the old one.
            share: a.
            modality: What the rows are.

        Returns:
            (m, new_dim) unit rows.

        Raises:
            ConfigError: If the share is not in [0, 1].
            SpaceMismatchError: If the projection is not of these two models.
        """
        require_share(share)
        if (projection.new_dim, projection.old_dim) != (self.old_dim, self.new_dim):
            raise SpaceMismatchError(
                f"the projection maps {projection.new_dim} → {projection.old_dim} dimensions, but the way "
                f"back from this map is {self.old_dim} → {self.new_dim}; give the projection of its models"
            )
        back = projection(self(vectors, modality), modality)
        return unit_rows((1 - share) * unit_rows(as_vectors(vectors, "gallery rows")) + share * back)


def fit_caption_map(
    old: Vectors,
    new: Vectors,
    *,
    rules: Mapping[str, Neighbours] | None = None,
    owners: Tensor | None = None,
) -> CaptionForwardMap:
    """Make a caption forward map of the vectors of the same captions, or other items, under both models.

    Args:
        old: (n, old_dim) vectors of the old model.
        new: (n, new_dim) vectors of the new model for the same items.
        rules: Settings for rows that are images and texts; by default k = 50, τ = 0.05, plain.
        owners: (n,) int64, what each item belongs to, -1 for nothing.

    Returns:
        The map. Attach the spaces with ``set_spaces(old_space, new_space)``, the one that comes in first.

    Raises:
        DataError: If vectors are empty, not of the same items, hold NaN, or are all zero on one side.
    """
    incoming, target = as_vectors(old, "old vectors").float(), as_vectors(new, "new vectors").float()
    if len(incoming) != len(target):
        raise DataError(
            f"there are {len(target)} rows of new vectors for {len(incoming)} old vectors; give both of the "
            "same items"
        )
    made = CaptionForwardMap(incoming.shape[1], target.shape[1], len(incoming), rules)
    made.anchors.data, made.targets.data = unit_rows(incoming), unit_rows(target)
    made.rotation.data = procrustes_rotation(made.anchors, made.targets).float()
    if owners is not None:
        made.owners.copy_(owners)
    return made.eval()


def require_share(share: float) -> None:
    """Refuse a share of the forward scores outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of the forward scores is {share}, but must lie in [0, 1]")
