"""Export a store or gallery: .npy and Parquet files, and SQL for PostgreSQL with pgvector.

    accelerate launch recipes/export_gallery.py --config recipes/configs/export_gallery.yaml

Every file appears whole or not at all, and the same command writes it again. docs/serving.md shows the use of
the files.

Not supported: several processes; both parts of a gallery in one export.
"""

from xbt.config import run_recipe
from xbt.serve.export import ExportConfig, run_export


def main(config: ExportConfig) -> None:
    """Export and print the result."""
    print(run_export(config))


if __name__ == "__main__":
    run_recipe(main, ExportConfig)
