from __future__ import annotations

import hashlib
import io

import pytest
from PIL import Image

from xbt.errors import ImageError
from xbt.images import draw_probe_images, load_image


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


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(tmp_path)


def test_a_given_name_is_used():
    with pytest.raises(ImageError, match="image coco/17 cannot be decoded"):
        load_image(b"junk", name="coco/17")


def test_an_implausibly_large_image_is_refused(monkeypatch, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(encoded(picture))


def test_probe_images_are_fixed():
    images = draw_probe_images()
    assert [image.size for image in images] == [(64, 64), (64, 64), (96, 64), (64, 64)]
    assert all(image.mode == "RGB" for image in images)
    digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
    # Spaces that were saved carry vectors of these very pixels.
    assert digest == "40b8cdb03b6a87df5464718afec81ae9f827ce7a04972a1d4d8bdf00510b937c"
    assert len({image.tobytes() for image in images}) == 4
