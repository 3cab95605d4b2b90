"""Untrusted tars and images: reading ends quickly and takes little memory, whatever they contain."""

from __future__ import annotations

import gzip
import tarfile
import time

import pytest
from fuzzing import damaged, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from pictures import SCENES, encoded
from PIL import Image

from xbt.data.captions import CaptionSource
from xbt.data.image_collection import ImageCollection, open_captions, open_images
from xbt.data.load_pairs import load_pairs
from xbt.images import read_image


def member(name, data=b"", kind=tarfile.REGTYPE, size=None):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def record(key, value):
    size = len(key) + len(value) + 3
    while len(f"{size} {key}={value}\n") != size:
        size = len(f"{size} {key}={value}\n")
    return f"{size} {key}={value}\n".encode()


PICTURE = encoded(SCENES.image(0), "PNG")
WHOLE = member("a.jpg", PICTURE) + member("a.txt", b"one\ntwo\n") + member("b.png", PICTURE)
END = bytes(1024)
SPARSE = (
    record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "c.jpg")
)


def read_all(source):
    return [entry for part in source.parts for entry in part.read()]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (member("h", kind=tarfile.XHDTYPE, size=3 << 30), "a header has 3,221,225,472 bytes"),
        (member("h", kind=tarfile.GNUTYPE_LONGNAME, size=2 << 20), "a header has 2,097,152 bytes"),
        (
            b"".join(member("h", record(f"k{n}", "v"), tarfile.XGLTYPE) for n in range(99)),
            "more than 8 headers",
        ),
        (
            member("h", record("path", "a/" * 4_000 + "c.jpg"), tarfile.XHDTYPE) + member("c"),
            "a name of 8,005",
        ),
        (member("h", SPARSE, tarfile.XHDTYPE) + member("c.jpg", b"9999999\n"), "is stored as a sparse file"),
        (member("c.jpg", kind=tarfile.GNUTYPE_SPARSE), "is stored as a sparse file"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_headers_that_unpack_without_end(tmp_path, data, words, packed):
    path = tmp_path / ("t.tar.gz" if packed else "t.tar")
    path.write_bytes(gzip.compress(WHOLE + data + END) if packed else WHOLE + data + END)
    *good, last = read_all(open_images(ImageCollection(str(path))))
    assert [item.value for item in good] == [PICTURE] * 2
    assert words in last.reason


def test_members_that_no_caption_or_image_needs(tmp_path):
    (tmp_path / "t.tar").write_bytes(WHOLE + member("c.txt", b"\n" * (5 << 20)) + END)
    *_, last = read_all(open_captions(CaptionSource(str(tmp_path / "t.tar"))))
    assert "c.txt has 5242880 bytes, which no image or caption needs" in last.reason


def test_hidden_members_are_left_out(tmp_path):
    hidden = b"".join(
        member(name, PICTURE) for name in ("@eaDir/a.jpg", ".thumbnails/b.jpg", "__MACOSX/c.png")
    )
    (tmp_path / "t.tar").write_bytes(hidden + WHOLE + END)
    assert [item.id for item in read_all(open_images(ImageCollection(str(tmp_path / "t.tar"))))] == [
        "t/a",
        "t/b",
    ]


@st.composite
def tars(draw):
    """Write damaged tars with valid header checksums around an intact one."""
    pieces = [member("a.jpg", PICTURE), member("a.txt", b"one\n")]
    for _ in range(draw(st.integers(1, 4))):
        header = bytearray(
            member(draw(st.sampled_from(["b.jpg", "../c.txt", "é.png", "x" * 99])), size=9)[:512]
        )
        at = draw(st.integers(0, 511))
        header[at : at + 8] = draw(st.binary(max_size=8)).ljust(8, b"\0")[: 512 - at]
        header[156:157] = draw(st.sampled_from([b"0", b"S", b"K", b"L", b"x", b"g", b"X", b"1", b"5"]))
        header[124:136] = draw(
            st.sampled_from([b"00000000010\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"-" * 12])
        )
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        body = draw(
            st.sampled_from([b"", SPARSE, record("path", "../d.jpg"), record("size", "-1"), b"\n" * 99])
        )
        pieces.insert(draw(st.integers(0, len(pieces))), bytes(header) + body + bytes(-len(body) % 512))
    return b"".join(pieces) + END


def test_a_header_that_claims_more_bytes_than_any_file_has(tmp_path):
    header = bytearray(member("b.jpg", size=9)[:512])
    header[124:136] = b"\x80" + b"\xff" * 11
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "0.tar"
    for data in (WHOLE + bytes(header), gzip.compress(WHOLE + bytes(header))):
        path.write_bytes(data)
        start = time.process_time()
        items = read_all(open_images(ImageCollection(str(path))))
        assert time.process_time() - start < 10
        assert len(items) > 1


@fuzzed
@given(st.one_of(tars(), damaged(WHOLE + END), damaged(gzip.compress(WHOLE + END))))
def test_fuzz_tars(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_tars"
    (folder / "test").mkdir(parents=True, exist_ok=True)
    path = folder / "test/0.tar"
    path.write_bytes(data)
    (folder / "test/nshards.txt").write_text("1")
    for item in loads_or_refuses(lambda: read_all(open_images(ImageCollection(str(path))))) or []:
        loads_or_refuses(lambda item=item: read_image(getattr(item, "value", b"")))
    loads_or_refuses(lambda: read_all(open_captions(CaptionSource(str(path)))))
    loads_or_refuses(lambda: load_pairs(str(folder)))


@fuzzed
@given(st.sampled_from([b"retrieval", b"x" * 9_000, b"\xff", b""]), damaged(b"1"), damaged(b"0.tar"))
def test_fuzz_retrieval_folders(tmp_path_factory, kind, count, name):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_folders"
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "dataset_type.txt").write_bytes(kind)
    (folder / "test/nshards.txt").write_bytes(count)
    (folder / "test/0.tar").write_bytes(WHOLE + END)
    loads_or_refuses(lambda: load_pairs(str(folder)))


FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "JPEG2000"]


@pytest.mark.parametrize("kind", FORMATS)
def test_fuzz_images(kind):
    whole = encoded(Image.effect_noise((24, 16), 50).convert("RGB"), kind)

    @fuzzed
    @given(damaged(whole))
    def check(data):
        loads_or_refuses(lambda: read_image(data), len(data))

    check()


def test_an_icon_with_a_picture_of_another_size():
    inner = encoded(Image.new("RGB", (200, 1)), "PNG")
    header = b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0])
    icon = header + len(inner).to_bytes(4, "little") + (22).to_bytes(4, "little") + inner
    assert loads_or_refuses(lambda: read_image(icon)) is None
