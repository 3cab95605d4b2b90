"""Choose the method for queries to the old gallery on held-out retrieval, and save it.

    accelerate launch recipes/choose_projection.py --config recipes/configs/choose_b32_l14.yaml

Both models embed the captions and a few hundred image–text pairs once. Every candidate (a projection, and a
combination of its queries with the old ones) is tested on held-out pairs. A direction without a significant
gain keeps the old query. The result is a compatible encoder.

Not supported: several processes.
"""

from xbt.cli.fit import FitConfig, run_fit
from xbt.config import run_recipe


def main(config: FitConfig) -> None:
    """Choose and print the decision."""
    print(run_fit(config))


if __name__ == "__main__":
    run_recipe(main, FitConfig)
