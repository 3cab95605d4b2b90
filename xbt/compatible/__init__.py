"""The compatible encoder that users save, load, push and serve."""

from xbt.compatible.encoder import CompatibleEncoder, load_upgraded

__all__ = ["CompatibleEncoder", "load_upgraded"]
