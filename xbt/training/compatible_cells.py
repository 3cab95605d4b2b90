"""What a trained backbone is worth: old/old, new/old and new/new retrieval, the criterion, gain and tax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xbt.data import LabelledImages
from xbt.evaluation import compatibility_tax, evaluate_labels, prefix_vectors, update_gain

METRICS = {"top1": "CMC top-1", "top5": "CMC top-5", "mAP": "mAP"}
_PAIRS = (
    ("old", "old"),
    ("new", "old"),
    ("new", "new"),
    ("independent", "old"),
    ("independent", "independent"),
)


@dataclass(frozen=True)
class BackboneReport:
    """Retrieval within a labelled test set, every image a query and every other one the gallery.

    Attributes:
        cells: ``"query/gallery"`` → metric → value, fractions; old galleries are compared with the leading
            coordinates of new vectors.
        criterion: Metric → whether new/old is strictly better than old/old; empty without an old model.
        update_gain: Metric → (new/old − old/old) / (independent/independent − old/old), ``None`` where the
            independent model is not better than the old one; empty unless both are there.
        compatibility_tax: Metric → independent/independent − new/new; empty without an independent model.
        n_images: Images of the test set.
    """

    cells: dict[str, dict[str, float]]
    criterion: dict[str, bool]
    update_gain: dict[str, float | None]
    compatibility_tax: dict[str, float]
    n_images: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return dict(vars(self))

    def format(self) -> str:
        """A Markdown table in percent, with a line for each of the other measures; no newline at the end."""
        lines = [f"| query/gallery | {' | '.join(METRICS.values())} |", f"|---|{'---:|' * len(METRICS)}"]
        for name, cell in self.cells.items():
            lines.append(f"| {name} | {' | '.join(f'{100 * cell[metric]:.1f}' for metric in METRICS)} |")
        lines += ["", f"- percent, over {self.n_images:,} images, each a query among all the others"]
        told: list[tuple[str, Mapping[str, float | bool | None]]] = [
            ("criterion (new/old > old/old)", self.criterion),
            ("update gain", self.update_gain),
            ("compatibility tax, in points", self.compatibility_tax),
        ]
        for title, values in told:
            if values:
                parts = ", ".join(
                    f"{METRICS[metric]} {_shown(value, title)}" for metric, value in values.items()
                )
                lines.append(f"- {title}: {parts}")
        return "\n".join(lines)


def measure_backbones(vectors: Mapping[str, Tensor], images: LabelledImages) -> BackboneReport:
    """Measures every cell that there are vectors for.

    Args:
        vectors: ``"new"`` and, where they are at hand, ``"old"`` and ``"independent"`` → (n, dim) whole
            vectors of the test images.
        images: The n test images, for their labels.

    Raises:
        DataError: If no image has another one of its class.
    """
    cells: dict[str, dict[str, float]] = {}
    own = range(len(images))
    for query, gallery in _PAIRS:
        if query in vectors and gallery in vectors:
            queries, items = prefix_vectors(vectors[query], vectors[gallery])
            found = evaluate_labels(
                queries, images.labels, items, images.labels, query_ids=own, gallery_ids=own, ks=(1, 5)
            )
            cells[f"{query}/{gallery}"] = found.metrics()
    new, old = cells["new/new"], cells.get("old/old", {})
    across, best = cells.get("new/old", {}), cells.get("independent/independent", {})
    return BackboneReport(
        cells,
        {metric: across[metric] > old[metric] for metric in old},
        {metric: update_gain(across[metric], old[metric], best[metric]) for metric in old if best},
        {metric: compatibility_tax(best[metric], new[metric]) for metric in best},
        len(images),
    )


def _shown(value: float | bool | None, title: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "met" if value else "not met"
    return f"{100 * value:.1f}" + ("%" if "gain" in title else "")
