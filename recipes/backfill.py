"""Backfill a gallery with the new model while it serves, most urgent items first, until the gain stops.

    accelerate launch recipes/backfill.py --config recipes/configs/backfill_b32_l14.yaml

Items are embedded again in a chosen order and moved into the gallery's second part, where they are searched
at once. Recall over the fraction backfilled goes to curve.jsonl and curve.png, rejected items to
rejected.jsonl. Processes share the items. A job that was killed, or that has spent its budget, continues with
the same command and any number of processes.

Not supported: galleries of texts; images that can only be read as a stream.
"""

from xbt.backfill import BackfillConfig
from xbt.cli.app import backfill_and_draw
from xbt.config import run_recipe
from xbt.processes import is_main_process


def main(config: BackfillConfig) -> None:
    """Backfill, draw the measured curve and print the progress."""
    result = backfill_and_draw(config)
    if is_main_process():
        print(result)


if __name__ == "__main__":
    run_recipe(main, BackfillConfig)
