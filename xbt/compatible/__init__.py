"""What a user saves, loads, pushes and serves: the new CLIP, speaking the old one's space."""

from xbt.compatible.encoder import CompatibleEncoder

__all__ = ["CompatibleEncoder"]
