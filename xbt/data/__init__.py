"""Captions, image–text pairs, labelled images and the built-in scenes."""

from xbt.data.captions import CaptionSource, read_captions
from xbt.data.image_text_pairs import ImageTextPairs, Rejected
from xbt.data.labelled_images import LabelledImages
from xbt.data.labelled_source import LabelledSource, load_labelled
from xbt.data.pairs import PairSource, load_pairs, load_readable_pairs
from xbt.data.scene import Scene, SceneObject
from xbt.data.scenes import make_scenes, scene_captions

__all__ = [
    "CaptionSource",
    "ImageTextPairs",
    "LabelledImages",
    "LabelledSource",
    "PairSource",
    "Rejected",
    "Scene",
    "SceneObject",
    "load_labelled",
    "load_pairs",
    "load_readable_pairs",
    "make_scenes",
    "read_captions",
    "scene_captions",
]
