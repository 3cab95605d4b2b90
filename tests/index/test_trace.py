"""One public operation of a gallery passes through few files, and a write takes few calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from galleries import make_space, names, unit

import xbt
from xbt.index import Gallery

PACKAGE = str(Path(xbt.__file__).parent)
OLD, NEW = make_space(), make_space("new", dim=24, seed=1)
OPERATIONS = {
    "add": lambda gallery: gallery.add(unit(200, 16), names(200, start=100), OLD),
    "search": lambda gallery: gallery.search(unit(1, 16), 5, OLD, part="old"),
    "backfill": lambda gallery: gallery.backfill(unit(20, 24), names(20), NEW),
    "remove": lambda gallery: gallery.remove(names(5, start=30)),
    "compact": lambda gallery: gallery.compact(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_passes_through_few_files(tmp_path, name):
    gallery = Gallery.create(tmp_path / "g", space=OLD)
    gallery.add(unit(50, 16), names(50), OLD)
    gallery.search(unit(1, 16), 5)
    gallery.begin_part(NEW)
    gallery.remove(names(5, start=40))
    files, calls = set(), 0

    def profile(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.add(frame.f_code.co_filename)
            calls += 1

    sys.setprofile(profile)
    try:
        OPERATIONS[name](gallery)
    finally:
        sys.setprofile(None)
    assert len(files) <= 8, sorted(files)
    if name in ("add", "search"):
        assert calls <= 100
