"""Evaluation job: load the encoders, measure the cells, and write the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from xbt.compatible.encoder import load_upgraded
from xbt.data import ImageTextPairs, PairSource, Rejected, load_pairs
from xbt.data.load_pairs import keep_readable
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError
from xbt.evaluation.cells import evaluate_retrieval
from xbt.evaluation.protocols import (
    PROTOCOLS,
    CheckedReport,
    Expectation,
    Protocol,
    average_folds,
    check_report,
    find_protocol,
    require_comparable,
)
from xbt.evaluation.table import format_markdown
from xbt.run_dir import RunDirectory


@dataclass
class EvaluationConfig:
    """Measure old/old, new/old and new/new retrieval on image–text pairs, in both directions.

    Writes ``retrieval.json`` and ``retrieval.md`` to the output directory.
    """

    old: str
    """The encoder of the gallery."""
    new: str
    """The unchanged new encoder."""
    pairs: PairSource
    """Held-out image–text pairs."""
    output_dir: str
    """Directory of the results."""
    upgraded: dict[str, str] = field(default_factory=dict)
    """Upgrades by label: directories or Hub repositories of compatible encoders, or of projections alone
    (stage 1)."""
    own: dict[str, str] = field(default_factory=dict)
    """Compatible encoders by label to be measured on their own galleries, as new/new (label)."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Cut-offs of R@k."""
    protocol: str | None = None
    """The test set that the pairs must be: flickr30k_1k, coco_5k, coco_1k, flickr30k_all, coco_2014_val or
    nocaps_val. Its counts are checked before anything is encoded, and its folds are averaged."""
    expected: list[Expectation] = field(default_factory=list)
    """Published values to compare with; those of other models are ignored."""
    fail_on_mismatch: bool = False
    """Fail if a published value is not reproduced (after the results are written) or will not be measured
    (before anything is encoded)."""
    device: str | None = None
    """Device of the encoders; by default the GPU, if there is one."""
    overwrite: bool = False
    """Replace the results of another evaluation in the output directory."""


def run_evaluation(
    config: EvaluationConfig,
    show: Callable[[CheckedReport], object] | None = None,
    protocols: Mapping[str, Protocol] = PROTOCOLS,
) -> CheckedReport:
    """Measure the cells and write them to the output directory.

    Args:
        config: The settings.
        show: Callback for the report, before a mismatch can end the job.
        protocols: Protocols that ``config.protocol`` can name.

    Returns:
        The report; ``format_table`` prints it.

    Raises:
        XbtError: If an encoder, a saved artifact or the pairs cannot be used, or the pairs do not match the
            protocol. With ``fail_on_mismatch`` also if nothing was published for these models, a published
            value will not be measured, or one is not reproduced, after everything is written.

    Warns:
        UserWarning: If images are left out because they cannot be decoded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the evaluation runs in one process; launch it with --num_processes 1")
    run = RunDirectory(
        config.output_dir, config, config.overwrite, may_change=["expected", "fail_on_mismatch"]
    )
    protocol = None if config.protocol is None else find_protocol(config.protocol, protocols)
    # The cell of a single upgrade has no label.
    names = (
        {f"new/old ({label})": "new/old" for label in config.upgraded} if len(config.upgraded) == 1 else {}
    )
    if config.fail_on_mismatch:
        cells = ["old/old", "new/new", *(f"new/new ({label})" for label in config.own)]
        cells += names.values() or [f"new/old ({label})" for label in config.upgraded]
        require_comparable(config.expected, config.old, config.new, cells, config.ks, names)
    pairs, folds = _open(config.pairs, protocol)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # A misspelt name is found before the images are decoded, which takes minutes.
    old, new = load_encoder(config.old, device), load_encoder(config.new, device)
    upgraded, own = (
        {label: load_upgraded(path, config.new, config.old, device) for label, path in given.items()}
        for given in (config.upgraded, config.own)
    )
    folds, rejected = _readable(pairs, folds, protocol)
    measured = average_folds(
        [evaluate_retrieval(fold, old, new, upgraded, tuple(config.ks), True, own) for fold in folds]
    )
    report = check_report(measured, protocol, config.expected, config.old, config.new, names)
    run.prepare()
    skipped = [{"id": item.id, "reason": item.reason} for item in rejected]
    run.write_json("retrieval.json", {**report.to_dict(), "skipped_images": skipped})
    (run.path / "retrieval.md").write_text(format_markdown(report) + "\n", encoding="utf-8")
    if show is not None:
        show(report)
    if config.fail_on_mismatch:
        report.require_agreement()
    return report


def _open(source: PairSource, protocol: Protocol | None) -> tuple[ImageTextPairs, list[ImageTextPairs]]:
    """Open the pairs and cut them into folds, without decoding images; a protocol checks the counts."""
    if protocol is None:
        pairs = load_pairs(source)
        return pairs, [pairs]
    if source.limit is not None and source.kind != "scenes":
        raise ConfigError(
            f"limit {source.limit} was given with the protocol {protocol.name!r}, which takes every image; "
            "leave one of them out"
        )
    pairs = load_pairs(source)
    return pairs, protocol.prepare(pairs, source.source)


def _readable(
    pairs: ImageTextPairs, folds: list[ImageTextPairs], protocol: Protocol | None
) -> tuple[list[ImageTextPairs], list[Rejected]]:
    """Leave out unreadable images; with a protocol, an unreadable image is an error."""
    if protocol is None:
        readable, rejected = keep_readable(pairs, progress=True)
        return [readable], rejected
    _, rejected = pairs.drop_unreadable(progress=True)
    if rejected:
        raise DataError(
            f"the protocol {protocol.name!r} takes every image, but {len(rejected)} of {len(pairs)} cannot "
            f"be read, first: {rejected[0].reason}; get them again, or leave the protocol out"
        )
    return folds, []
