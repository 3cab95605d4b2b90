"""Backfill a gallery with the new model while it serves: the most urgent items first, for as long as it pays.

    accelerate launch recipes/backfill.py --config recipes/configs/backfill_b32_l14.yaml

Items are embedded anew in an order and moved into the gallery's second part, from where they are searched at
once. Recall over the fraction backfilled goes to curve.jsonl and curve.png, what could not be embedded to
rejected.jsonl. Processes share the items. A job that was killed, or that has spent its budget, continues when
the same command is given again, with any number of processes.

Not supported: galleries of texts; images that can only be read as a stream.
"""

import os
from pathlib import Path

from xbt.backfilling import BackfillConfig, run_backfill
from xbt.config import run_recipe
from xbt.report import draw_backfill_curve


def main(config: BackfillConfig) -> None:
    """Backfills, and draws what was measured."""
    result = run_backfill(config)
    if not result.curve or os.environ.get("RANK", "0") != "0":
        return
    points = result.curve
    stop = next((each.fraction for each in points if each.position == result.stopping_position), None)
    recall = {f"R@{k}": [each.recall[k] for each in points] for k in points[0].recall}
    path = Path(config.output_dir) / "curve.png"
    draw_backfill_curve([each.fraction for each in points], recall, path, stop)


if __name__ == "__main__":
    run_recipe(main, BackfillConfig)
