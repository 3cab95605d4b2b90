"""Should you upgrade? Measure it on a sample of your own items and queries before you re-embed anything.

    accelerate launch --num_processes 1 recipes/upgrade_report.py --config recipes/configs/report_b32_l14.yaml

Both models embed a sample of images with texts, or existing vectors of both are read. One part of the sample
chooses the method, the other part measures it. The verdict, the cells, the queries that change, the cost and
the limits go to report.html, one self-contained file, and to report.json.

The exit status is 0 if the verdict is to upgrade and every --fail_under threshold is met, 1 if not, and 2
for a wrong input.

Not supported: several processes.
"""

import sys

from xbt.config import run_recipe
from xbt.report import UpgradeReportConfig, write_upgrade_report


def main(config: UpgradeReportConfig) -> None:
    """Measure, write the report and print it."""
    report = write_upgrade_report(config)
    print(report.format())
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    run_recipe(main, UpgradeReportConfig)
