"""The report job: draw a sample, choose a method, measure it, give a verdict, and write the report."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from typing import Any

from xbt.errors import ConfigError, DataError
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.auto.candidates import NEW_ALONE
from xbt.projections.auto.choose import choose_projection
from xbt.projections.auto.decision import Decision
from xbt.projections.auto.selection import MIN_IMAGES, GainTest
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.fitting import fit_projection
from xbt.report.config import FailUnder, UpgradeReportConfig
from xbt.report.cost import measure_cost
from xbt.report.curve import MIN_ITEMS, expect_curve
from xbt.report.measure import OLD, Measured, find_flips, measure
from xbt.report.page import render_page
from xbt.report.result import UpgradeReport
from xbt.report.sample import Sample, embed_sample, read_sample
from xbt.report.verdict import check_thresholds, give_verdict
from xbt.run_dir import RunDirectory

HTML, JSON = "report.html", "report.json"
_MIN_SAMPLE = 4
_MAY_CHANGE = ("device", *(f"fail_under.{key.name}" for key in fields(FailUnder)))
"""Settings that may differ when a report is made again in the same directory; they change no number."""


def write_upgrade_report(config: UpgradeReportConfig) -> UpgradeReport:
    """Measure on a sample whether to upgrade, and write ``report.html`` and ``report.json``.

    Returns:
        The report; print its ``format()``.

    Raises:
        XbtError: If an encoder, vectors, pairs, captions or a setting cannot be used.

    Warns:
        UserWarning: If images were left out, or the sample is too small for intervals.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the report is made in one process; launch it with --num_processes 1")
    run = RunDirectory(config.output_dir, config, config.overwrite, _MAY_CHANGE)
    sample = embed_sample(config, run.prepare) if config.vectors is None else read_sample(config)
    if len(sample) < _MIN_SAMPLE:
        raise DataError(
            f"the sample has {len(sample)} images with texts, too few to choose a method on some and measure "
            f"it on others; give at least {2 * MIN_IMAGES}, better some hundreds"
        )
    run.prepare()
    chosen, shown = sample.split(config.choose_fraction, config.seed)
    if min(len(chosen), len(shown)) < MIN_IMAGES:
        warnings.warn(
            f"the sample is too small for intervals: {len(chosen)} images to choose by and {len(shown)} to "
            f"measure with, and fewer than {MIN_IMAGES} show nothing",
            stacklevel=2,
        )
    decision, alone = choose_method(chosen, config, config.use_old), None
    needs_old = [d for d in shown.pairs.directions if decision.ensemble.needs_old(d) and decision.deployed(d)]
    if len(chosen) >= MIN_IMAGES and needs_old:
        alone = choose_method(chosen, config, use_old=False)
    measured = measure(decision, alone, shown.pairs, config.ks, len(chosen))
    report = UpgradeReport(
        config,
        sample,
        shown,
        measured,
        give_verdict(measured, config.confidence, config.worthwhile, config.seed),
        check_thresholds(config.fail_under, measured),
        find_flips(measured, config.examples),
        measure_cost(sample, measured, config.gallery_size),
        expect_curve(chosen, measured, config.seed),
        _find_limits(sample, measured, config.gallery_size),
    )
    run.write_json(JSON, report.to_dict())
    (run.path / HTML).write_text(render_page(report), encoding="utf-8")
    return report


_TAKEN = "procrustes"


class Untried(Decision):
    """A method that was not compared with others, because the sample is too small.

    ``n_texts`` is the number of texts that it was fitted to.
    """

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: that of a decision, with ``"none"`` as evidence."""
        return {**super().to_dict(), "evidence": "none"}

    def __str__(self) -> str:
        combinations = (f"{name}: {self.ensemble.combination(name)}" for name in DIRECTIONS)
        return "\n".join(
            [
                f"{self.name} was taken without a choice: {self.n_images} images are too small a sample to "
                f"choose by, for fewer than {MIN_IMAGES} cannot show a gain",
                f"fitted to {self.n_texts:,} texts",
                *combinations,
            ]
        )


def choose_method(chosen: Sample, config: UpgradeReportConfig, use_old: bool) -> Decision:
    """Choose a method on one part of the sample.

    With fewer than :data:`~xbt.projections.auto.choose.MIN_IMAGES` images, Procrustes is fitted to the corpus
    (or else to the texts of this part), and its query is mixed in equal parts with the old one. Without
    ``use_old``, only the new query is used at search time.
    """
    new, old = chosen.corpus or (None, None)
    if len(chosen) >= MIN_IMAGES:
        return choose_projection(
            new,
            old,
            pairs=chosen.pairs,
            thorough=config.thorough,
            use_old=use_old,
            ks=config.ks,
            confidence=config.confidence,
            seed=config.seed,
            new_space=chosen.new.space,
            old_space=chosen.old.space,
        )
    if new is None or old is None:
        new, old = chosen.pairs.new_texts, chosen.pairs.old_texts
    spaces = chosen.new.space, chosen.old.space
    projection = fit_projection(new, old, _TAKEN, new_space=spaces[0], old_space=spaces[1])
    ensemble = QueryEnsemble.midpoint(projection.old_dim, projection.old_space)
    if not use_old:
        ensemble = QueryEnsemble(
            projection.old_dim, dict.fromkeys(DIRECTIONS, NEW_ALONE), old_space=projection.old_space
        )
    return Untried(
        projection,
        ensemble,
        _TAKEN,
        "own captions",
        {name: GainTest.unknown(name, "the sample is too small to choose by") for name in DIRECTIONS},
        (),
        len(chosen),
        len(new),  # type: ignore[arg-type]  # a sample's corpus is never a stream
        config.confidence,
        0,
    )


def _find_limits(sample: Sample, measured: Measured, gallery_size: int) -> list[str]:
    """List the limits of a report as sentences, the most important first."""
    limits = [*_limits_of_size(sample, measured, gallery_size), *sample.notes]
    if sample.corpus is None:
        limits.append(
            "No text corpus was given: projections were fitted only to the texts of the sample, and more "
            "captions may improve them."
        )
    if measured.pairs.new_images is None:
        limits.append(
            "The images have no vectors of the new model: image queries and the result of re-embedding the "
            "gallery are unknown."
        )
    elif min(measured.n_chosen, len(measured.pairs)) < MIN_ITEMS:
        limits.append(f"Fewer than {MIN_ITEMS} images on a side: no backfill curve was drawn.")
    if sample.skipped:
        listed = ", ".join(name for name, _ in sample.skipped[:5])
        more = f" and {len(sample.skipped) - 5} more" if len(sample.skipped) > 5 else ""
        limits.append(f"{len(sample.skipped)} images could not be read and were left out: {listed}{more}.")
    if sample.old.encoder is None:
        limits.append("No encoder was given: the time to embed an image or a query was not measured.")
    return [*limits, *_ALWAYS]


_ALWAYS = (
    "An image counts as wrong unless the text was written for it, even if the text describes it too.",
    "If either model was trained on these images or texts, its results are too optimistic.",
    "The texts of the sample represent the queries of your users. If users ask differently, measure with "
    "their queries.",
)


def _limits_of_size(sample: Sample, measured: Measured, gallery_size: int) -> list[str]:
    n_images = len(measured.pairs)
    limits = []
    if min(measured.n_chosen, n_images) < MIN_IMAGES:
        limits.append(
            f"The sample is too small for intervals: {measured.n_chosen} images to choose by and {n_images} "
            f"to measure with, and fewer than {MIN_IMAGES} show nothing. Use a larger sample."
        )
        if measured.n_chosen < MIN_IMAGES:
            limits.append(
                "The method was not chosen by comparison: it is a map fitted to texts, mixed in equal parts "
                "with the old query where the old model may run."
            )
    half_width = max(
        (interval[2] - interval[1]) / 2
        for interval in (
            measured.interval(OLD, direction, k) for direction in measured.directions for k in measured.ks
        )
    )
    limits.append(
        f"Measured on {n_images:,} images and {len(measured.pairs.image_of_text):,} texts, drawn from "
        f"{sample.available:,} images; R@k is known to within ±{100 * half_width:.1f} points at worst."
    )
    if gallery_size > n_images:
        limits.append(
            f"R@k was measured among {n_images:,} images. Among the {gallery_size:,} images of the gallery "
            "R@k is lower for every model, and the differences change."
        )
    return limits
