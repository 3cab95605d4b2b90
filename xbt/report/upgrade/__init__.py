"""Should you upgrade? A sample of the user's own items and queries, measured before anything is spent."""

from __future__ import annotations

from xbt.report.upgrade.config import FailUnder, UpgradeReportConfig, VectorSource
from xbt.report.upgrade.job import write_upgrade_report
from xbt.report.upgrade.result import UpgradeReport

__all__ = ["FailUnder", "UpgradeReport", "UpgradeReportConfig", "VectorSource", "write_upgrade_report"]
