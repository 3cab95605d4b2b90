"""Captions of the built-in scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box")}
COLOUR_WORDS = {"purple": ("purple", "violet")}
BACKGROUND_WORDS = {"grey": ("grey", "gray"), "checkered": ("checkered", "checked")}
PLACE_WORDS = (
    ("at the top left", "in the upper left", "in the top left corner"),
    ("at the top", "at the top centre"),
    ("at the top right", "in the upper right", "in the top right corner"),
    ("on the left", "at the middle left"),
    ("in the centre", "in the middle"),
    ("on the right", "at the middle right"),
    ("at the bottom left", "in the lower left", "in the bottom left corner"),
    ("at the bottom", "at the bottom centre"),
    ("at the bottom right", "in the lower right", "in the bottom right corner"),
)
_OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ", "we see ")


class Thing(Protocol):
    """An object to describe."""

    @property
    def shape(self) -> str: ...  # noqa: D102
    @property
    def colour(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> str: ...  # noqa: D102
    @property
    def cell(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class _Details:
    """Details that a caption mentions besides the colour and shape of every object."""

    size: bool
    place: bool
    background: bool


# Half of the captions mention everything; the others leave out one detail, rarely two.
_DETAILS = (
    *[_Details(size=True, place=True, background=True)] * 5,
    *[_Details(size=True, place=True, background=False)] * 2,
    _Details(size=False, place=True, background=True),
    _Details(size=True, place=False, background=True),
    _Details(size=False, place=True, background=False),
)


def word_scene(objects: Sequence[Thing], background: str, rng: random.Random) -> str:
    """Write one lower-case English caption that mentions every object with its colour and shape."""
    details = _pick(rng, _DETAILS)
    order = sorted(objects, key=lambda _: rng.random())
    relation = _relation(order) if details.place else None
    if relation is not None and rng.random() < 0.3:
        first, second = (_name(thing, details, rng) for thing in order)
        body = f"{first} {relation} {second}"
    else:
        place_first = details.place and rng.random() < 0.2
        body = _enumerate([_locate(thing, details, place_first, rng) for thing in order])
        if place_first:
            return body if not details.background else f"on {_ground(background, rng)}, {body}"
    if not details.background:
        return _pick(rng, _OPENINGS) + body
    ground = _ground(background, rng)
    if rng.random() < 0.25:
        return f"on {ground}, {body}"
    return _pick(rng, _OPENINGS) + body + _pick(rng, (" on ", ", on ", " over ")) + ground


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _name(thing: Thing, details: _Details, rng: random.Random) -> str:
    colour = _pick(rng, COLOUR_WORDS.get(thing.colour, (thing.colour,)))
    words = [colour, _pick(rng, SHAPE_WORDS.get(thing.shape, (thing.shape,)))]
    if details.size:
        words.insert(0, _pick(rng, SIZE_WORDS[thing.size]))
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _locate(thing: Thing, details: _Details, place_first: bool, rng: random.Random) -> str:
    name = _name(thing, details, rng)
    if not details.place:
        return name
    place = _pick(rng, PLACE_WORDS[thing.cell])
    return f"{place} {name}" if place_first else f"{name} {place}"


def _relation(objects: Sequence[Thing]) -> str | None:
    """Relation of the first of two objects to the second; ``None`` unless they share a row or column."""
    if len(objects) != 2:
        return None
    (row, column), (other_row, other_column) = (divmod(thing.cell, 3) for thing in objects)
    if column == other_column:
        return "above" if row < other_row else "below"
    if row == other_row:
        return "to the left of" if column < other_column else "to the right of"
    return None


def _ground(background: str, rng: random.Random) -> str:
    return f"a {_pick(rng, BACKGROUND_WORDS.get(background, (background,)))} background"


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
