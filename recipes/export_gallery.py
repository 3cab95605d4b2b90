"""Write a store or gallery for others: .npy and Parquet, and SQL for PostgreSQL with pgvector.

    accelerate launch recipes/export_gallery.py --config recipes/configs/export_gallery.yaml

What has been written appears whole or not at all, and the same command writes it again. docs/serving.md says
what to do with it.

Not supported: several processes; both parts of a gallery that is being backfilled at once.
"""

from xbt.config import run_recipe
from xbt.serve.export import ExportConfig, run_export


def main(config: ExportConfig) -> None:
    """Exports and prints."""
    print(run_export(config))


if __name__ == "__main__":
    run_recipe(main, ExportConfig)
