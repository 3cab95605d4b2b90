"""Functions behind the commands: run a job and describe its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xbt.cli.output import CommandResult

if TYPE_CHECKING:
    from xbt.backfill import BackfillConfig, BackfillResult
    from xbt.cli.fit import FitConfig
    from xbt.cli.push import PushConfig
    from xbt.cli.search import SearchConfig
    from xbt.embedding import EmbedConfig
    from xbt.evaluation.job import EvaluationConfig
    from xbt.report import UpgradeReportConfig


def embed(config: EmbedConfig) -> CommandResult:
    """Embed, and describe the store."""
    from xbt.cli.gallery import describe_store
    from xbt.embedding import embed as run
    from xbt.embedding.rejected import NOTES, REJECTED

    store = run(config)
    document = describe_store(store)
    for name in (REJECTED, NOTES):
        document[Path(name).stem] = (store.path / name).read_bytes().count(b"\n")
    left_out = f"; {document['rejected']} rejected, see {REJECTED}" if document["rejected"] else ""
    text = f"{store.path}: {len(store)} {store.modality} vectors of {store.space}{left_out}"
    return CommandResult(document, text)


def fit(config: FitConfig) -> CommandResult:
    """Fit or choose a projection."""
    from xbt.cli.fit import run_fit

    result = run_fit(config)
    return CommandResult(result.to_dict(), str(result))


def evaluate(config: EvaluationConfig) -> CommandResult:
    """Evaluate; a published value that is not reproduced is an error after the table."""
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
    return CommandResult(measured[0].to_dict(), format_table(measured[0]), error=mismatch)


def report(config: UpgradeReportConfig) -> CommandResult:
    """Write the upgrade report; the status is its verdict."""
    from xbt.report import write_upgrade_report

    result = write_upgrade_report(config)
    return CommandResult(result.to_dict(), result.format(), 0 if result.passed else 1)


def search(config: SearchConfig) -> CommandResult:
    """Search a gallery."""
    from xbt.cli.search import run_search

    answer = run_search(config)
    return CommandResult(answer.to_dict(), str(answer))


def backfill(config: BackfillConfig) -> CommandResult:
    """Backfill, and draw the measured curve."""
    result = backfill_and_draw(config)
    return CommandResult(result.to_dict(), str(result))


def backfill_and_draw(config: BackfillConfig) -> BackfillResult:
    """Backfill, and draw the measured recall over the fraction backfilled as ``curve.png``."""
    from xbt.backfill import run_backfill
    from xbt.processes import is_main_process
    from xbt.report import draw_backfill_curve

    result = run_backfill(config)
    points = result.curve
    if points and is_main_process():
        stop = next((point.fraction for point in points if point.position == result.stopping_position), None)
        recall = {f"R@{k}": [point.recall[k] for point in points] for k in points[0].recall}
        path = Path(config.output_dir) / "curve.png"
        draw_backfill_curve([point.fraction for point in points], recall, path, stop)
    return result


def push(config: PushConfig) -> CommandResult:
    """Upload to the Hub."""
    from xbt.cli.push import push as run

    result = run(config)
    return CommandResult(result.to_dict(), result.format())
