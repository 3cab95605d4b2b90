"""What a user saves, loads, pushes and serves: the new CLIP, speaking the old one's space."""

from xbt.compatible.encoder import CompatibleEncoder
from xbt.compatible.loading import load_upgraded

__all__ = ["CompatibleEncoder", "load_upgraded"]
