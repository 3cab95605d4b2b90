"""The fixed texts and images that spaces are probed with."""

from __future__ import annotations

import hashlib

from xbt.space import PROBE_TEXTS, PROBE_VERSION, draw_probe_images


def test_sixteen_different_texts():
    assert len(set(PROBE_TEXTS)) == 16


def test_four_images_larger_and_smaller_than_any_input():
    images = draw_probe_images()
    assert [image.size for image in images] == [(600, 600), (48, 48), (96, 64), (400, 260)]
    assert all(image.mode == "RGB" for image in images)


def test_probes_change_only_with_their_version():
    """Spaces that were saved carry the vectors of these very texts and pixels."""
    pixels = b"".join(image.tobytes() for image in draw_probe_images())
    texts = "\n".join(PROBE_TEXTS).encode()
    assert PROBE_VERSION == 2
    assert hashlib.sha256(pixels).hexdigest() == (
        "b60bc13c5b3f9514990253f8db7774845117a758337cf181cf22bd4cc4cf5d8c"
    )
    assert hashlib.sha256(texts).hexdigest() == (
        "413f7bbf4beb0023c9b66befb44a80f4cfe98c31b4332f1c6e045f62190a1d5b"
    )
