"""Captions, image–text pairs and the built-in scenes."""

from xbt.data.captions import CaptionSource, read_captions
from xbt.data.image_text_pairs import ImageTextPairs, Rejected
from xbt.data.pairs import PairSource, load_pairs, load_readable_pairs
from xbt.data.scene import Scene, SceneObject
from xbt.data.scenes import make_scenes, scene_captions

__all__ = [
    "CaptionSource",
    "ImageTextPairs",
    "PairSource",
    "Rejected",
    "Scene",
    "SceneObject",
    "load_pairs",
    "load_readable_pairs",
    "make_scenes",
    "read_captions",
    "scene_captions",
]
