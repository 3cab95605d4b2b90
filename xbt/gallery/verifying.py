"""Looking for damage in everything a gallery consists of."""

from __future__ import annotations

import numpy as np

from xbt.gallery.contents import Contents
from xbt.gallery.home import Home
from xbt.gallery.segments import StoredSegment


def faults_of(home: Home | None, contents: Contents) -> list[str]:
    """Everything that is wrong with a gallery, a sentence each; every byte is read.

    Args:
        home: Its directory; in memory there is none, and only ids can be wrong.
        contents: What is in it.
    """
    faults = items_searched_twice(contents)
    if home is not None:
        faults += home.faults()
    for part in contents.parts:
        for segment in part.segments:
            if isinstance(segment, StoredSegment):
                faults += segment.faults()
    if home is not None:
        for about in home.record.parts:
            faults += home.cache(about.name).faults()
    return faults


def items_searched_twice(contents: Contents) -> list[str]:
    """A sentence for each; only changed files make such."""
    seen: set[str] = set()
    twice = []
    for part in contents.parts:
        for row in np.flatnonzero(~part.masked):
            item = part.ids[row]
            if item in seen:
                twice.append(f"the id {item!r} is searched twice, again in row {row} of part {part.name!r}")
            seen.add(item)
    return twice
