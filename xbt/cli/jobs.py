"""What each command runs, and what it then has to say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xbt.cli.output import Outcome

if TYPE_CHECKING:
    from xbt.backfill import BackfillConfig, BackfillResult
    from xbt.cli.fit import FitConfig
    from xbt.cli.push import PushConfig
    from xbt.cli.search import SearchConfig
    from xbt.embedding import EmbedConfig
    from xbt.evaluation.job import EvaluationConfig
    from xbt.report import UpgradeReportConfig


def embed(config: EmbedConfig) -> Outcome:
    """Embeds, and describes the store."""
    from xbt.cli.gallery import describe_store
    from xbt.embedding import embed as run
    from xbt.embedding.rejected import NOTES, REJECTED

    store = run(config)
    about = describe_store(store)
    for name in (REJECTED, NOTES):
        about[Path(name).stem] = (store.path / name).read_bytes().count(b"\n")
    left_out = f"; {about['rejected']} rejected, see {REJECTED}" if about["rejected"] else ""
    text = f"{store.path}: {len(store)} {store.modality} vectors of {store.space}{left_out}"
    return Outcome(about, text)


def fit(config: FitConfig) -> Outcome:
    """Fits or chooses."""
    from xbt.cli.fit import run_fit

    result = run_fit(config)
    return Outcome(result.to_dict(), str(result))


def evaluate(config: EvaluationConfig) -> Outcome:
    """Measures; a published value that is not reproduced ends it when the table has been shown."""
    from xbt.errors import DataError
    from xbt.evaluation import CheckedReport, format_table
    from xbt.evaluation.job import run_evaluation

    measured: list[CheckedReport] = []
    mismatch = None
    try:
        run_evaluation(config, measured.append)
    except DataError as error:
        if not measured:
            raise
        mismatch = error
    return Outcome(measured[0].to_dict(), format_table(measured[0]), error=mismatch)


def report(config: UpgradeReportConfig) -> Outcome:
    """Writes the upgrade report; the status is its verdict."""
    from xbt.report import write_upgrade_report

    result = write_upgrade_report(config)
    return Outcome(result.to_dict(), result.format(), 0 if result.passed else 1)


def search(config: SearchConfig) -> Outcome:
    """Searches."""
    from xbt.cli.search import run_search

    answer = run_search(config)
    return Outcome(answer.to_dict(), str(answer))


def backfill(config: BackfillConfig) -> Outcome:
    """Backfills, and draws what was measured."""
    result = backfill_and_draw(config)
    return Outcome(result.to_dict(), str(result))


def backfill_and_draw(config: BackfillConfig) -> BackfillResult:
    """Backfills, and draws recall over the fraction backfilled, if it was measured, as ``curve.png``."""
    from xbt.backfill import run_backfill
    from xbt.processes import is_main_process
    from xbt.report import draw_backfill_curve

    result = run_backfill(config)
    points = result.curve
    if points and is_main_process():
        stop = next((each.fraction for each in points if each.position == result.stopping_position), None)
        recall = {f"R@{k}": [each.recall[k] for each in points] for k in points[0].recall}
        path = Path(config.output_dir) / "curve.png"
        draw_backfill_curve([each.fraction for each in points], recall, path, stop)
    return result


def push(config: PushConfig) -> Outcome:
    """Uploads."""
    from xbt.cli.push import push as run

    result = run(config)
    return Outcome(result.to_dict(), result.format())
