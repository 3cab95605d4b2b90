"""The report job: draw a sample, choose a method, measure it, give a verdict, and write the report."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields

from xbt.errors import ConfigError, DataError
from xbt.projections.auto.choose import MIN_IMAGES
from xbt.report.config import FailUnder, UpgradeReportConfig
from xbt.report.cost import measure_cost
from xbt.report.curve import expect_curve
from xbt.report.examples import find_flips
from xbt.report.from_vectors import read_sample
from xbt.report.limits import find_limits
from xbt.report.measure import measure
from xbt.report.page import render_page
from xbt.report.result import UpgradeReport
from xbt.report.sample import embed_sample
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
    measured = measure(chosen, shown, config)
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
        find_limits(sample, measured, config.gallery_size),
    )
    run.write_json(JSON, report.to_dict())
    (run.path / HTML).write_text(render_page(report), encoding="utf-8")
    return report
