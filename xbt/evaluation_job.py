"""The evaluation recipe's job: load the encoders, measure the cells, write them down."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from xbt.compatible import CompatibleEncoder
from xbt.compatible.saving import ENSEMBLE_DIR
from xbt.data import PairSource, load_readable_pairs
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError
from xbt.evaluation.cells import RetrievalReport, evaluate_retrieval
from xbt.evaluation.table import format_markdown
from xbt.hub import fetch, read_json
from xbt.projections import Projection
from xbt.run_dir import RunDirectory


@dataclass
class EvaluationConfig:
    """Measure old/old, new/old and new/new retrieval on image–text pairs, in both directions.

    Writes ``retrieval.json`` and ``retrieval.md`` to the output directory.
    """

    old: str
    """The encoder that embedded the gallery."""
    new: str
    """The new encoder as it is off the shelf."""
    pairs: PairSource
    """Held-out image–text pairs."""
    output_dir: str
    """Where the results go."""
    upgraded: dict[str, str] = field(default_factory=dict)
    """By label, what makes the new model speak the old space: directories or Hub repositories of compatible
    encoders, or of projections alone (stage 1)."""
    own: dict[str, str] = field(default_factory=dict)
    """By label, compatible encoders to be measured on galleries of their own, as new/new (label)."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Cut-offs of R@k."""
    device: str | None = None
    """Where the encoders run; the GPU if there is one."""
    overwrite: bool = False
    """Replace the results of another evaluation in the output directory."""


def run_evaluation(config: EvaluationConfig) -> RetrievalReport:
    """Measures the cells and writes them to the output directory.

    Args:
        config: What to measure.

    Returns:
        The report; ``format_table`` prints it.

    Raises:
        XbtError: If an encoder, a saved part or the pairs cannot be used.

    Warns:
        UserWarning: If images were left out because they cannot be decoded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the evaluation runs in one process; launch it with --num_processes 1")
    run = RunDirectory(config.output_dir, config, config.overwrite)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pairs, rejected = load_readable_pairs(config.pairs, progress=True)
    old, new = load_encoder(config.old, device), load_encoder(config.new, device)
    upgraded = {label: _load_upgraded(path, config, device) for label, path in config.upgraded.items()}
    own = {label: _load_upgraded(path, config, device) for label, path in config.own.items()}
    report = evaluate_retrieval(pairs, old, new, upgraded, tuple(config.ks), progress=True, own=own)
    run.prepare()
    skipped = [{"id": each.id, "reason": each.reason} for each in rejected]
    run.write_json("retrieval.json", {**report.to_dict(), "skipped_images": skipped})
    (run.path / "retrieval.md").write_text(format_markdown(report) + "\n", encoding="utf-8")
    return report


def _load_upgraded(source: str, config: EvaluationConfig, device: str) -> DualEncoder:
    """A compatible encoder as saved, or the new encoder behind a projection alone."""
    directory = fetch(source)
    if "kind" in read_json(directory / "config.json"):
        return CompatibleEncoder(load_encoder(config.new, device), Projection.from_pretrained(directory))
    old = config.old if (directory / ENSEMBLE_DIR).is_dir() else None
    return CompatibleEncoder.from_pretrained(directory, base=config.new, old=old, device=device)
