"""Backfill: the job that moves an index into the new model's space, its orders, and its curves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xbt.backfill.config import BackfillConfig as BackfillConfig
    from xbt.backfill.curve import BackfillCurve as BackfillCurve
    from xbt.backfill.curve import CurvePoint as CurvePoint
    from xbt.backfill.curve import StoppingPoint as StoppingPoint
    from xbt.backfill.curve import backfill_curve as backfill_curve
    from xbt.backfill.curve import stopping_point as stopping_point
    from xbt.backfill.job import BackfillResult as BackfillResult
    from xbt.backfill.job import run_backfill as run_backfill
    from xbt.backfill.orders import distance_to_mean_order as distance_to_mean_order
    from xbt.backfill.orders import fastfill_order as fastfill_order
    from xbt.backfill.orders import oldest_first as oldest_first
    from xbt.backfill.orders import query_log_order as query_log_order
    from xbt.backfill.orders import random_order as random_order
    from xbt.backfill.rehearsal import RehearsedOrder as RehearsedOrder
    from xbt.backfill.rehearsal import fit_rehearsed_order as fit_rehearsed_order
    from xbt.backfill.target import load_merge as load_merge
    from xbt.backfill.target import save_merge as save_merge

# Loaded at first use: orders and curves need neither the encoders nor Accelerate.
_NAMES = {
    "config": ("BackfillConfig",),
    "curve": ("BackfillCurve", "CurvePoint", "StoppingPoint", "backfill_curve", "stopping_point"),
    "job": ("BackfillResult", "run_backfill"),
    "orders": ("distance_to_mean_order", "fastfill_order", "oldest_first", "query_log_order", "random_order"),
    "rehearsal": ("RehearsedOrder", "fit_rehearsed_order"),
    "target": ("load_merge", "save_merge"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'xbt.backfill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"xbt.backfill.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
