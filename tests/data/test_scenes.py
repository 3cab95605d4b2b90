from __future__ import annotations

import hashlib
import random
import re

import numpy as np
import pytest

from xbt.data import Scene, SceneObject, make_scenes, scene_captions
from xbt.data.scenes import BACKGROUNDS, COLOURS, SHAPES, iterate_scenes, scene_split
from xbt.errors import ConfigError

# Meaning of each word, written by hand independently of the code under test.
SHAPE_OF = {"circle": "circle", "disc": "circle", "square": "square", "box": "square", "triangle": "triangle"}
SHAPE_OF |= {"star": "star", "cross": "cross", "heart": "heart"}
COLOUR_OF = {name: name for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")}
COLOUR_OF |= {"violet": "purple"}
SIZE_OF = {"small": "small", "little": "small", "tiny": "small", "big": "big", "large": "big"}
GROUND_OF = {"gray": "grey", "checked": "checkered"}
OBJECT = re.compile(
    rf"\b(?P<article>an?) (?:(?P<size>{'|'.join(SIZE_OF)}) )?(?P<colour>{'|'.join(COLOUR_OF)}) "
    rf"(?P<shape>{'|'.join(SHAPE_OF)})\b"
)
ROW_OF = {"top": 0, "upper": 0, "bottom": 2, "lower": 2}
COLUMN_OF = {"left": 0, "right": 2}


def cell_of_phrase(place):
    """Read a phrase such as ``in the lower left`` without the code's table."""
    words = place.split()
    row = next((ROW_OF[word] for word in words if word in ROW_OF), 1)
    column = next((COLUMN_OF[word] for word in words if word in COLUMN_OF), 1)
    return 3 * row + column


def check_caption(scene, caption):
    found = list(OBJECT.finditer(caption))
    assert len(found) == len(scene.objects)
    by_name = {(thing.colour, thing.shape): thing for thing in scene.objects}
    said = [by_name.pop((COLOUR_OF[hit["colour"]], SHAPE_OF[hit["shape"]])) for hit in found]
    for hit, thing in zip(found, said, strict=True):
        assert hit["size"] is None or SIZE_OF[hit["size"]] == thing.size
    for ground in re.findall(r"a (\w+) background", caption):
        assert GROUND_OF.get(ground, ground) == scene.background
    rest = re.sub(r"(on|over) a \w+ background,?", "", OBJECT.sub("*", caption))
    check_places(rest, said)


def check_places(rest, said):
    relation = re.search(r"\b(above|below|to the left of|to the right of)\b", rest)
    if relation:
        (row, column), (other_row, other_column) = (divmod(thing.cell, 3) for thing in said)
        assert {
            "above": row < other_row and column == other_column,
            "below": row > other_row and column == other_column,
            "to the left of": column < other_column and row == other_row,
            "to the right of": column > other_column and row == other_row,
        }[relation[1]]
        return
    places = re.findall(r"\b(?:at|in|on) the [a-z ]*?(?=,| and\b| \*|$)", rest.strip())
    assert len(places) in (0, len(said))
    for place, thing in zip(places, said, strict=False):
        assert cell_of_phrase(place) == thing.cell, rest


def test_captions_are_true():
    scenes = list(iterate_scenes(400, seed=11))
    rng = random.Random(0)
    captions = [(scene, scene.describe(rng)) for scene in scenes for _ in range(10)]
    for scene, caption in captions:
        check_caption(scene, caption)
        assert caption == caption.lower()
        assert len(caption.split()) <= 40
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |,,| ,", caption), caption
    texts = [caption for _, caption in captions]
    assert 0.5 < np.mean(["background" in caption for caption in texts]) < 0.9
    assert 0.6 < np.mean([any(word in caption.split() for word in SIZE_OF) for caption in texts]) < 0.95


def test_the_check_of_captions_can_fail():
    scene = Scene((SceneObject("star", "blue", "big", 0), SceneObject("heart", "red", "small", 2)), "grey")
    check_caption(scene, "a big blue star at the top left and a tiny red heart in the upper right")
    for lie in (
        "a small blue star and a red heart",
        "a blue star and a blue heart",
        "a blue star",
        "a blue star and a red heart on a black background",
        "a blue star at the top and a red heart in the upper right",
        "a red heart to the left of a blue star",
    ):
        with pytest.raises((AssertionError, KeyError)):
            check_caption(scene, lie)


def test_scenes_are_distinct_and_well_formed():
    scenes = list(iterate_scenes(3000, seed=1))
    assert len({scene.key for scene in scenes}) == 3000
    assert len(set(scenes)) == 3000
    for scene in scenes:
        cells = [thing.cell for thing in scene.objects]
        assert 1 <= len(cells) <= 3
        assert cells == sorted(set(cells))
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {thing.shape for scene in scenes for thing in scene.objects} == set(SHAPES)
    assert {thing.colour for scene in scenes for thing in scene.objects} == set(COLOURS)


def test_splits_are_disjoint_whatever_the_seeds():
    found = {
        split: {scene.key for seed in range(5) for scene in iterate_scenes(400, seed, split)}
        for split in ("train", "val", "test")
    }
    assert not found["train"] & found["val"]
    assert not found["train"] & found["test"]
    assert not found["val"] & found["test"]
    assert all(len(keys) > 1500 for keys in found.values())
    assert {scene_split(scene) for scene in iterate_scenes(50, 9, "val")} == {"val"}


def test_scenes_are_the_same_everywhere():
    lines = [scene.key for scene in iterate_scenes(100, seed=7, split="test")]
    lines += scene_captions(100, seed=7, split="test")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "5388b6db7b84b5184d9c710031ba204094db5c818063bbccbd3ba8954addb8f9"


def test_two_calls_agree_and_a_longer_one_begins_with_a_shorter():
    first, again = make_scenes(20, seed=4), make_scenes(20, seed=4)
    longer, other = make_scenes(30, seed=4), make_scenes(20, seed=5)
    assert np.array_equal(first.images.pixels, again.images.pixels)
    assert first.captions == again.captions
    assert first.ids == again.ids == longer.ids[:20]
    assert longer.captions[:20] == first.captions
    assert np.array_equal(longer.images.pixels[:20], first.images.pixels)
    assert first.captions != other.captions


def test_captions_of_a_scene_differ():
    pairs = make_scenes(200, captions_per_scene=5)
    assert all(len(set(texts)) == 5 for texts in pairs.captions)
    assert len(make_scenes(2, captions_per_scene=1).texts) == 2


@pytest.mark.parametrize("size", [16, 32, 50, 128])
def test_drawings_show_their_objects(size):
    for scene in iterate_scenes(60, seed=size):
        image = scene.draw(size)
        assert (image.size, image.mode) == ((size, size), "RGB")
        pixels = np.asarray(image).astype(int)
        empty = np.asarray(Scene((), scene.background).draw(size)).astype(int)
        painted = (np.abs(pixels - empty).max(axis=-1) > 40).astype(float)
        for thing in scene.objects:
            row, column = divmod(thing.cell, 3)
            x, y = (int((part + 0.5) * size / 3) for part in (column, row))
            assert np.abs(pixels[y, x] - COLOURS[thing.colour]).max() < 70
        occupied = {thing.cell for thing in scene.objects}
        edges = [round(k * size / 3) for k in range(4)]
        for cell in set(range(9)) - occupied:
            row, column = divmod(cell, 3)
            inside = painted[edges[row] + 1 : edges[row + 1] - 1, edges[column] + 1 : edges[column + 1] - 1]
            assert inside.sum() == 0


def test_big_objects_are_bigger_and_shapes_differ():
    def ink(shape, size):
        scene = Scene((SceneObject(shape, "red", size, 4),), "black")
        return np.asarray(scene.draw(48)).astype(int)[..., 0]

    for shape in SHAPES:
        assert ink(shape, "big").sum() > 2 * ink(shape, "small").sum()
    for i, shape in enumerate(SHAPES):
        for other in SHAPES[:i]:
            assert np.abs(ink(shape, "small") - ink(other, "small")).sum() > 0.1 * ink(shape, "small").sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "number of scenes is 0"),
        ({"n": 1, "split": "dev"}, "no split 'dev'; choose one of train, val, test"),
        ({"n": 1, "image_size": 8}, "image_size is 8"),
        ({"n": 1, "captions_per_scene": 0}, "captions_per_scene is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_scenes(**arguments)
