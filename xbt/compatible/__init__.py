"""The compatible encoder that users save, load, push and serve."""

from xbt.compatible.encoder import CompatibleEncoder
from xbt.compatible.loading import load_upgraded

__all__ = ["CompatibleEncoder", "load_upgraded"]
