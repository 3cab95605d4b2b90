"""Captions, image–text pairs, labelled images and the built-in scenes."""

from xbt.data.captions import CaptionSource, read_captions
from xbt.data.items import Rejected
from xbt.data.labelled import LabelledImages, LabelledSource, load_labelled
from xbt.data.load_pairs import PairSource, load_pairs, load_readable_pairs
from xbt.data.pairs import ImageTextPairs
from xbt.data.scenes import Scene, SceneObject, make_scenes, scene_captions

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
