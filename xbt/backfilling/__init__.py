"""The job that moves a gallery into the new model's space, item after item, for as long as it pays."""

from xbt.backfilling.config import BackfillConfig
from xbt.backfilling.curve import CurvePoint
from xbt.backfilling.job import run_backfill
from xbt.backfilling.merging import load_merge, save_merge
from xbt.backfilling.result import BackfillResult

__all__ = ["BackfillConfig", "BackfillResult", "CurvePoint", "load_merge", "run_backfill", "save_merge"]
