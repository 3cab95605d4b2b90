"""Choose what to query the old gallery with, by held-out retrieval, and save it; or learn that nothing helps.

    accelerate launch recipes/choose_projection.py --config recipes/configs/choose_b32_l14.yaml

Both models embed the captions and a few hundred image–text pairs once. Every candidate (projections, and
ways to combine their queries with the old ones) is fitted and judged on pairs it has not seen; a direction in
which no gain is shown stays with the old query. The result is a compatible encoder.

Not supported: several processes.
"""

from xbt.cli.fit import FitConfig, run_fit
from xbt.config import run_recipe


def main(config: FitConfig) -> None:
    """Chooses and prints."""
    print(run_fit(config))


if __name__ == "__main__":
    run_recipe(main, FitConfig)
