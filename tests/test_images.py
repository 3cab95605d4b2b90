from __future__ import annotations

import errno
import io
import os
import pickle
import re
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from pictures import png
from PIL import Image

import xbt.images as images_module
from xbt.data.image_folder import JoinedPaths
from xbt.errors import DataError, ImageError
from xbt.images import MAX_ASPECT_RATIO, MAX_PIXELS, load_image, read_image


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture():
    return Image.linear_gradient("L").convert("RGB").resize((20, 30))


def test_paths_bytes_and_images_give_the_same(picture, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture))
    for source in (path, str(path), path.read_bytes(), picture):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.size == (20, 30)
        assert loaded.tobytes() == picture.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode, picture):
    loaded = load_image(picture.convert(mode))
    assert loaded.mode == "RGB"
    assert loaded.size == picture.size


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.jpg does not exist"):
        load_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_fails_at_once(kind, picture, tmp_path):
    whole = encoded(picture.resize((200, 200)), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cut\.img cannot be decoded"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image at all"])
def test_what_is_no_image_is_refused(content, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for source, name in [(path, r"x\.jpg"), (content, f"given as {len(content)} bytes")]:
        with pytest.raises(ImageError, match=f"{name} cannot be decoded"):
            load_image(source)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name, reason in [
        (".", "it is a directory"),
        ("pipe.jpg", "it is a pipe"),  # opening it would wait for a writer for ever
        ("dangling.jpg", "does not exist"),
        ("loop.jpg", "Too many levels"),
        ("a" * 300, "File name too long"),
        ("nul\0byte", "embedded null byte"),
    ]:
        with pytest.raises(ImageError, match=reason):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="a pipe, socket or device"):
        load_image("/dev/zero")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")

    def refuse(*arguments, **options):  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"secret\.png cannot be decoded: .*Permission denied"):
        load_image(path)


def test_a_given_name_is_used():
    with pytest.raises(ImageError, match="image coco/17 cannot be decoded"):
        load_image(b"junk", name="coco/17")


def test_an_implausibly_large_image_is_refused(monkeypatch, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(encoded(picture))


def frames(kind, count=3):
    pictures = [Image.new("RGB", (8, 8), (80 * number, 0, 200)) for number in range(count)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def test_plain_rgb_has_no_note(picture):
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        assert read_image(encoded(picture, kind)).note is None


@pytest.mark.parametrize(
    ("mode", "kind", "note"),
    [
        ("L", "PNG", "grayscale converted to RGB"),
        ("1", "PNG", "black and white converted to RGB"),
        ("P", "PNG", "palette converted to RGB"),
        ("CMYK", "JPEG", "CMYK converted to RGB"),
        ("RGBA", "PNG", "transparency dropped"),
        ("LA", "PNG", "grayscale converted to RGB; transparency dropped"),
    ],
)
def test_what_is_converted_is_noted(mode, kind, note, picture):
    converted = picture.convert(mode)
    read = read_image(encoded(converted, kind))
    assert read.note == note
    assert read.image.mode == "RGB"
    if kind == "PNG":
        assert read.image.tobytes() == converted.convert("RGB").tobytes()


def test_a_transparent_palette_is_noted_without_a_warning(picture):
    buffer = io.BytesIO()
    picture.convert("P").save(buffer, "PNG", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note = read_image(buffer.getvalue()).note
    assert note.startswith("palette converted to RGB; transparency dropped")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_of_several_frames_is_taken(kind):
    read = read_image(frames(kind))
    assert "first of 3 frames" in read.note
    red, green, blue = read.image.getpixel((4, 4))
    assert (red < 30, green < 30, blue > 170) == (True, True, True)


def test_a_later_frame_that_is_cut_off_does_no_harm():
    whole = frames("GIF", 5)
    read = read_image(whole[: len(whole) - 30])
    assert "first of " in read.note
    assert read.image.getpixel((4, 4))[2] > 170


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_channels_are_refused(mode, picture):
    deep = picture.convert("L").convert("I") if mode == "I;16" else picture.convert("L").convert(mode)
    for source in (deep.convert(mode), encoded(deep.convert(mode), "TIFF")):
        with pytest.raises(ImageError, match=r"more than 8 bits per pixel \(mode .*convert it to 8 bits"):
            read_image(source)


def test_sixteen_bits_in_three_channels_are_noted():
    pixel = struct.pack(">HHH", 0x8000, 0xFF00, 0x00FF)
    read = read_image(png(1, 1, bits=16, rows=zlib.compress(b"\0" + pixel)))
    assert read.note == "16 bits per channel reduced to 8"
    assert read.image.getpixel((0, 0)) == (0x80, 0xFF, 0x00)


def test_a_bomb_is_refused_by_its_header():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    side = int(MAX_PIXELS**0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in ((side + 2, side), (60_000, 60_000)):
            with pytest.raises(ImageError, match="pixels"):
                read_image(png(*size))
        with pytest.raises(ImageError, match="truncated"):  # let through, and found to have no pixels
            read_image(png(side, side))


def test_postscript_is_never_run(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *arguments: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="PostScript"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_a_gigantic_aspect_ratio_is_refused():
    long = MAX_ASPECT_RATIO * 2
    assert read_image(Image.new("RGB", (long, 2))).note is None
    for size in ((long + 1, 2), (2, long + 1), (1, 10_000)):
        with pytest.raises(ImageError, match="longer side must not exceed 100 times the shorter"):
            read_image(encoded(Image.new("RGB", size)))


def test_exif_orientation_is_left_alone(picture):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(buffer, "PNG", exif=exif)
    assert read_image(buffer.getvalue()).image.tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack"),
        OSError("broken"),
        EOFError(),
        OverflowError("x"),
        RecursionError(),
        KeyError("y"),
    ],
)
def test_whatever_a_decoder_raises_is_an_image_error(error, picture, monkeypatch):
    data = encoded(picture)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ImageError, match="image a/b cannot be decoded: "):
        read_image(data, name="a/b")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "Too many open files"),
        (errno.ENFILE, "Too many open files in system"),
        (errno.EIO, "Input/output error"),
        (errno.ESTALE, "Stale file handle"),
        (errno.ETIMEDOUT, "Connection timed out"),
        (errno.ENOTCONN, "not connected"),
        (errno.ENOMEM, "Cannot allocate memory"),
        (errno.ENOSPC, "No space left"),
    ],
)
@pytest.mark.parametrize("place", ["os.stat", "PIL.Image.open", "PIL.Image.Image.convert"])
def test_a_fault_of_the_system_is_no_fault_of_the_image(picture, tmp_path, monkeypatch, number, words, place):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture))

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:  # pytest itself needs os.stat
        patch.setattr(place, fail)
        try:
            read_image(path)
        except DataError as error:
            caught = error
    assert re.search(rf"a\.png cannot be read: .*{words}", str(caught))
    assert not isinstance(caught, ImageError)


def test_want_of_memory_is_no_fault_of_the_image(picture, monkeypatch):
    data = encoded(picture)

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(DataError, match=r"image a/b cannot be read: memory ran out; .* run") as caught:
        read_image(data, name="a/b")
    assert not isinstance(caught.value, ImageError)


def test_a_folder_that_is_gone_is_no_fault_of_the_image(picture, tmp_path):
    """A mount that was lost leaves an empty folder, or none."""
    folder = tmp_path / "photos"
    for name in ("a/1.png", "a/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture))
    listed = JoinedPaths(folder, ["a/1.png", "a/2.png"])
    again = pickle.loads(pickle.dumps(listed[0]))  # as it comes to a worker
    assert (again, again.root) == (f"{folder}/a/1.png", str(folder))

    def problem(source):
        with pytest.raises(DataError) as caught:
            read_image(source)
        return type(caught.value), str(caught.value)

    (folder / "a/1.png").unlink()
    assert problem(again) == (ImageError, f"image {folder}/a/1.png does not exist")
    (folder / "a/2.png").unlink()
    (folder / "a").rmdir()  # an empty root
    for _ in range(2):
        kind, words = problem(listed[1])
        assert kind is DataError
        assert f"the folder {folder} is gone or empty; put it back and run the same command again" in words
        if folder.exists():
            folder.rmdir()
    kind, words = problem(str(folder / "a.png"))  # listed from nowhere: its own folder counts
    assert kind is DataError
    assert f"the folder {folder} is gone" in words
    folder.mkdir()
    assert problem(str(folder / "a.png"))[0] is ImageError


@pytest.mark.parametrize(
    "content",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        b"<!DOCTYPE html><html><body>404</body></html>",
        bytes(range(256)) * 8,
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    ],
)
def test_other_content_behind_an_image_suffix(content, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ImageError, match="cannot be decoded") as caught:
            read_image(source)
        assert " at 0x" not in str(caught.value)  # the same sentence in every run


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\0\0\0\x18ftypheic", r"is HEIC, and there is no decoder for \.heic; install pillow-heif"),
        (b"\0\0\0\x18ftypmif1", r"install pillow-heif"),
        (b"\xff\n", r"is JPEG XL, .* install pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n", r"install pillow-jxl-plugin"),
    ],
)
def test_formats_that_need_a_plugin(head, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    images_module._load.cache_clear()
    path = tmp_path / "photo"
    path.write_bytes(head + bytes(60))
    for source in (str(path), path.read_bytes()):
        with pytest.raises(ImageError, match=f"cannot be decoded: it .*{words}"):
            read_image(source)
    images_module._load.cache_clear()


def test_a_plugin_that_is_installed_is_used(picture, tmp_path, monkeypatch):
    data = b"\0\0\0\x18ftypheic" + bytes(60)
    known = dict(Image.registered_extensions())

    def register():
        known[".heic"] = "HEIF"
        monkeypatch.setattr(Image, "open", lambda source: picture)

    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    images_module._load.cache_clear()
    assert read_image(data).image.tobytes() == picture.tobytes()
    images_module._load.cache_clear()


def test_what_is_no_source_at_all():
    with pytest.raises(ImageError, match="must be a PIL image, a path or bytes, got a int"):
        read_image(3)


def test_reading_in_threads_leaves_the_warnings_of_others_alone():
    """Catching warnings in several threads at once would leave their state broken for the whole process."""
    data = [encoded(Image.new("RGB", (600, 600), (number, 0, 0)), "JPEG") for number in range(64)]
    before = warnings.showwarning, list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(each.note is None for each in pool.map(read_image, data))
    finally:
        sys.setswitchinterval(interval)
    assert (warnings.showwarning, list(warnings.filters)) == before
