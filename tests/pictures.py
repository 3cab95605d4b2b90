"""Valid and hostile images for tests, in files and in tars."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from xbt.data import make_scenes

SCENES = make_scenes(64)


def png(width, height, bits=8, colour=2, rows=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, first, count):
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            content = encoded(SCENES.image(number), "PNG")
            info = tarfile.TarInfo(f"{number:04d}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_hostile_files(root):
    """Write 100 unusual files; return the names of those that can still be embedded."""
    random, scene = np.random.default_rng(0), SCENES.image(0).resize((64, 64))
    jpeg, whole_png = encoded(scene, "JPEG"), encoded(scene, "PNG")
    noise = encoded(Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")
    second = [SCENES.image(1).resize((64, 64))]
    good = {
        "cmyk.jpg": encoded(scene.convert("CMYK"), "JPEG"),
        "pixel.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "animated.gif": encoded(scene, "GIF", save_all=True, append_images=second),
        "animated.webp": encoded(scene, "WEBP", save_all=True, append_images=second),
        "pages.tiff": encoded(scene, "TIFF", save_all=True, append_images=second),
        "palette.png": encoded(scene.convert("P"), "PNG"),
        "rgba.png": encoded(scene.convert("RGBA"), "PNG"),
        "la.png": encoded(scene.convert("LA"), "PNG"),
        "gray.jpg": encoded(scene.convert("L"), "JPEG"),
        "bits.png": encoded(scene.convert("1"), "PNG"),
        "deep.png": png(1, 1, bits=16, rows=zlib.compress(b"\0" + bytes(6))),
        "png.jpg": whole_png,
        "trailing.jpg": jpeg + b"junk" * 100,
        "sideways.jpg": encoded(scene, "JPEG", exif=_turned()),
        "long.png": encoded(Image.new("RGB", (2, 200)), "PNG"),
        "UPPER.JPG": jpeg,
        "name with\nline feed.jpg": jpeg,
        os.fsdecode(b"caf\xe9.jpg"): jpeg,
    }
    bad = {
        "empty.jpg": b"",
        "bomb.png": png(60_000, 60_000),
        "small_bomb.png": png(10_000, 10_000),
        "svg.jpg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        "html.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "thin.png": encoded(Image.new("RGB", (1, 10_000)), "PNG"),
        "deep_gray.png": encoded(Image.new("I;16", (9, 9)), "PNG"),
        "float.tiff": encoded(Image.new("F", (9, 9)), "TIFF"),
        "no_pixels.png": png(64, 64),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "text.png": "ünïcode".encode(),
        "zip.jpg": b"PK\x03\x04" + bytes(60),
    }
    bad |= {f"cut_{n:02d}.jpg": noise[: len(noise) * n // 30] for n in range(1, 30)}
    bad |= {f"cut_{n:02d}.png": whole_png[: (len(whole_png) - 13) * n // 18] for n in range(1, 18)}
    bad |= {f"random_{n:02d}.jpg": random.bytes(int(random.integers(1, 5000))) for n in range(19)}
    for name, content in (good | bad).items():
        (root / name).write_bytes(content)
    (root / "unreadable.jpg").write_bytes(jpeg)
    (root / "unreadable.jpg").chmod(0)
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "loop.png").symlink_to("loop.png")
    may_read = os.access(root / "unreadable.jpg", os.R_OK)  # root may
    assert len(good) + len(bad) + 5 == 100
    return [*good, *(["unreadable.jpg"] if may_read else [])]


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
