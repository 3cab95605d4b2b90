"""Small images and tars, and what a source makes of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 7 * number % 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(count, first=0):
    return [
        member
        for number in range(first, first + count)
        for member in ((f"{number:04d}.png", picture(number)), (f"{number:04d}.txt", b"a dog\na cat\n"))
    ]


def entries(source, part=0, start=0, stop=None):
    return list(source.parts[part].read(start, stop))


def ids(found):
    return [entry.id for entry in found]


def value(item):
    """The bytes behind an item, wherever they are."""
    return Path(item.value).read_bytes() if isinstance(item.value, str) else item.value
