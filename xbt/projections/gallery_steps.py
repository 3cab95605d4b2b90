"""Gallery-side steps: caption forward map and hubness bias beside the query, in three deployments.

With q the unit query in the old space, q_new the query of the new model, f the
:mod:`~xbt.projections.caption_map` and h the :mod:`~xbt.projections.hubness` of a row g:

    score(q, g) = (1 − a) ⟨q, g⟩ + a ⟨q_new, f(g)⟩ − c h(g)

1. A second named vector f(g) and a number c·h(g) beside each row: :meth:`GallerySteps.second_vectors`,
   :meth:`GallerySteps.biases`; the database searches both and adds up.
2. One row [(1 − a) g; a f(g); −c h] searched with [q; q_new; 1] by inner product, in any database:
   :meth:`GallerySteps.rows`, :meth:`GallerySteps.queries`.
3. At query time for the first K candidates of an index that is not touched: :meth:`GallerySteps.rescore`.
   It is exact where K is the whole gallery.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError, DataError, SavedPartError, XbtError
from xbt.evaluation.cells import DIRECTIONS
from xbt.hub.configs import DIGESTS_KEY, SavedConfig
from xbt.hub.files import CONFIG_NAME, WEIGHTS_NAME, digests, write_config
from xbt.hub.weights import build_and_load, save_weights
from xbt.projections.base import Modality
from xbt.projections.caption_map import CaptionForwardMap, require_share
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.hubness import HubnessBias
from xbt.vectors import Vectors, as_vectors, unit_rows
from xbt.version import __version__

_FORMAT = "set_of_gallery_steps"


class GallerySteps(nn.Module):
    """The steps of one or both directions, with the query mixture they were chosen with.

    Args:
        ensemble: How the old query and the projected new one are combined where the steps are used.
        shares: Per direction that has steps, a: the share of the forward scores; 0 uses no forward map.
        forward_map: The caption forward map, if a share is above 0.
        biases: Hubness biases of some of these directions, over rows as :meth:`vectors` gives them.

    Raises:
        ConfigError: If there is no direction, one is not known, or a part is missing.
    """

    def __init__(
        self,
        ensemble: QueryEnsemble,
        shares: Mapping[str, float],
        forward_map: CaptionForwardMap | None = None,
        biases: Mapping[str, HubnessBias] | None = None,
    ) -> None:
        super().__init__()
        given = dict(biases or {})
        if not shares or set(shares) - set(DIRECTIONS) or set(given) - set(shares):
            raise ConfigError(
                f"gallery steps are for 'T2I' and 'I2T' or one of them, not for {sorted(shares)} with biases "
                f"for {sorted(given)}"
            )
        for direction, share in shares.items():
            require_share(share)
            if share and forward_map is None:
                raise ConfigError(
                    f"the share of {direction} is {share}, but there is no forward map; give it"
                )
        self.ensemble, self.shares, self.forward_map = ensemble, dict(shares), forward_map
        self.bias = nn.ModuleDict(given)

    def needs_new(self, direction: str) -> bool:
        """True if queries of a direction use the new model's vector, in the mixture or beside f(g)."""
        return bool(self.shares[direction]) or self.ensemble.needs_new(direction)

    def bias_of(self, direction: str) -> HubnessBias | None:
        """The hubness bias of a direction, if it has one."""
        found = dict(self.bias.items()).get(direction)
        assert found is None or isinstance(found, HubnessBias)
        return found

    @torch.no_grad()
    def second_vectors(self, direction: str, gallery: Vectors, own: Tensor | None = None) -> Tensor:
        """(m, new_dim) unit rows f(g), to be stored as a second vector of every row.

        Args:
            direction: ``"T2I"`` or ``"I2T"``.
            gallery: (m, old_dim) vectors of the old gallery.
            own: (m,) or (m, e) owners of the rows; see :meth:`CaptionForwardMap.forward`.

        Raises:
            ConfigError: If the direction has no forward map.
        """
        if not self.shares.get(direction) or self.forward_map is None:
            raise ConfigError(f"the steps of {direction} have no forward map, so that rows have one vector")
        modality: Modality = "image" if direction == "T2I" else "text"
        found: Tensor = self.forward_map(gallery, modality, own)
        return found

    @torch.no_grad()
    def vectors(self, direction: str, gallery: Vectors, own: Tensor | None = None) -> Tensor:
        """(m, d) rows [(1 − a) g; a f(g)] without the bias; (m, old_dim) where a is 0."""
        rows = unit_rows(as_vectors(gallery, "gallery vectors", self.ensemble.old_dim))
        share = self.shares[direction]
        if not share:
            return rows
        second = self.second_vectors(direction, rows, own).to(rows.dtype)
        return torch.cat([(1 - share) * rows, share * second], dim=1)

    @torch.no_grad()
    def biases(self, direction: str, gallery: Vectors, own: Tensor | None = None) -> Tensor:
        """(m,) numbers c·h(g) to subtract from the scores of every row; zeros without a bias."""
        return self._bias(direction, self.vectors(direction, gallery, own), own)

    def _bias(self, direction: str, rows: Tensor, own: Tensor | None) -> Tensor:
        bias = self.bias_of(direction)
        return rows.new_zeros(len(rows)) if bias is None else bias(rows, own)

    @torch.no_grad()
    def rows(self, direction: str, gallery: Vectors, own: Tensor | None = None) -> Tensor:
        """Rows for an index that searches by inner product.

        Args:
            direction: ``"T2I"`` or ``"I2T"``.
            gallery: (m, old_dim) vectors of the old gallery.
            own: (m,) or (m, e) int64 owners of the rows, whose captions and images are left out of what is
                measured about a row; for judging on pairs that the steps were made from.

        Returns:
            (m, old_dim + new_dim + 1) rows [(1 − a) g; a f(g); −c h]; without the part in the middle where
            a is 0. They are not of unit length.
        """
        rows = self.vectors(direction, gallery, own)
        return torch.cat([rows, -self._bias(direction, rows, own)[:, None]], dim=1)

    @torch.no_grad()
    def queries(
        self, direction: str, old: Tensor | None, projected: Tensor | None, new: Vectors | None
    ) -> Tensor:
        """Queries for :meth:`rows`.

        Args:
            direction: ``"T2I"`` or ``"I2T"``.
            old: (n, old_dim) vectors of the old model, where the mixture needs them.
            projected: (n, old_dim) projected vectors of the new model, where the mixture needs them.
            new: (n, new_dim) vectors of the new model, where a is above 0.

        Returns:
            (n, d) rows [q; q_new; 1], not of unit length.

        Raises:
            DataError: If a vector that is needed is not given.
        """
        mixed: Tensor = self.ensemble(old, projected, direction)
        parts = [mixed]
        if self.shares[direction]:
            if new is None:
                raise DataError(
                    f"the forward scores of {direction} need the new model's query vectors; give them"
                )
            parts.append(unit_rows(as_vectors(new, "new queries")).to(mixed.device, mixed.dtype))
        return torch.cat([*parts, mixed.new_ones(len(mixed), 1)], dim=1)

    @torch.no_grad()
    def rescore(self, direction: str, queries: Tensor, found: Tensor, gallery: Tensor) -> Tensor:
        """Score the candidates of a first search again with the steps.

        Only rows that are candidates of a query are mapped and measured.

        Args:
            direction: ``"T2I"`` or ``"I2T"``.
            queries: (n, d) from :meth:`queries`.
            found: (n, K) int64 gallery rows that the first search found, -1 for none.
            gallery: (m, old_dim) vectors of the old gallery.

        Returns:
            (n, K) scores in the order of the candidates, -∞ where there is none.
        """
        distinct, place = torch.unique(found.clamp_min(0), return_inverse=True)
        rows = self.rows(direction, gallery[distinct]).to(queries.dtype)
        scores = torch.einsum("nd,nkd->nk", queries, rows[place])
        return scores.masked_fill(found < 0, -torch.inf)

    def describe(self, direction: str) -> str:
        """One phrase on the steps of a direction."""
        parts = []
        if self.forward_map is not None and self.shares[direction]:
            rule = self.forward_map.rules["image" if direction == "T2I" else "text"]
            form = "residual" if rule.residual else "plain"
            parts.append(
                f"caption forward map ({form}, k={rule.k}, temperature={rule.temperature:g}, "
                f"share={self.shares[direction]:g})"
            )
        bias = self.bias_of(direction)
        if bias is not None:
            parts.append(f"hubness bias (weight={bias.weight:g}, k={bias.k}, bank of {len(bias.bank):,})")
        return " + ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The queries and numbers of the steps as JSON-able values."""
        return {
            direction: {"query": self.ensemble.combination(direction).to_dict(), **self._numbers(direction)}
            for direction in self.shares
        }

    def _numbers(self, direction: str) -> dict[str, Any]:
        bias = self.bias_of(direction)
        numbers = None
        if bias is not None:
            count, dim = bias.bank.shape
            numbers = {"dim": dim, "count": count, "weight": bias.weight, "k": bias.k}
        return {"share": self.shares[direction], "bias": numbers}

    def save(self, directory: str | Path) -> Path:
        """Write ``ensemble/``, maybe ``forward/``, banks and numbers to a directory, and return it."""
        path = Path(directory)
        self.ensemble.save_pretrained(path / "ensemble")
        if self.forward_map is not None:
            self.forward_map.save_pretrained(path / "forward")
        save_weights(self.bias, path / WEIGHTS_NAME)
        config = {
            "format": _FORMAT,
            "xbt_version": __version__,
            "directions": {direction: self._numbers(direction) for direction in self.shares},
            "forward": self.forward_map is not None,
            DIGESTS_KEY: digests(path, [WEIGHTS_NAME]),
        }
        write_config(path / CONFIG_NAME, config)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote, strictly.

        Raises:
            SavedPartError: If a file is missing, damaged, changed, of another kind, or does not fit another.
        """
        path = Path(directory)
        config = SavedConfig(path / CONFIG_NAME, _FORMAT, ("directions", "forward"))
        values = config.values
        ensemble = QueryEnsemble.from_pretrained(path / "ensemble")
        forward_map = CaptionForwardMap.from_pretrained(path / "forward") if values["forward"] else None
        try:
            shares = {name: float(each["share"]) for name, each in values["directions"].items()}
            banks = {name: each["bias"] for name, each in values["directions"].items() if each["bias"]}
            biases = build_and_load(
                path / WEIGHTS_NAME,
                lambda: nn.ModuleDict({name: HubnessBias(**each) for name, each in banks.items()}),
                config.file,
            )
            made = cls(ensemble, shares, forward_map, dict(biases.items()))  # type: ignore[arg-type]
        except SavedPartError:
            raise
        except (XbtError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise SavedPartError(f"{config.file} does not describe gallery steps: {error}") from error
        config.check_files()
        return made.eval()
