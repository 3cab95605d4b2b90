"""WebDataset tars: samples, ids, resuming, and rejected entries of damaged tars."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import tarfile

import fsspec
import pytest
from entries import entries, ids, picture, samples, value, write_tar
from jobs import config

from xbt.data import CaptionSource
from xbt.data.image_collection import ImageCollection, open_captions, open_images
from xbt.data.items import Item, Rejected
from xbt.data.tars import find_tars
from xbt.embedding import embed, work
from xbt.errors import DataError

PACK = {"w": bytes, "w:gz": gzip.compress, "w:bz2": bz2.compress, "w:xz": lzma.compress}


def test_tars_give_images_and_captions(tmp_path):
    write_tar(tmp_path / "a/000.tar", samples(3))
    write_tar(tmp_path / "b/001.tar", samples(2, first=3))
    for pattern in (f"{tmp_path}/*/*.tar", f"{tmp_path}/{{a/000,b/001}}.tar", f"file://{tmp_path}/*/*.tar"):
        source = open_images(ImageCollection(pattern))
        found = [item for part in range(2) for item in entries(source, part)]
        assert ids(found) == ["a/000/0000", "a/000/0001", "a/000/0002", "b/001/0003", "b/001/0004"]
        assert [value(item) for item in found] == [picture(number) for number in range(5)]
        assert entries(source, 0, start=2) == found[2:3]
        assert entries(source, 0, start=1, stop=2) == found[1:2]
    with fsspec.open(found[1].metadata["image_path"]) as file:  # the URL opens the image
        assert file.read() == picture(1)
    captions = entries(open_captions(CaptionSource(f"{tmp_path}/a/000.tar")))
    assert ids(captions)[:3] == ["000/0000#0", "000/0000#1", "000/0001#0"]
    assert captions[1].value == "a cat"


def test_brace_patterns():
    with pytest.raises(DataError, match="there is no such tar file"):
        find_tars("/nowhere/{08..11}.tar")
    from xbt.data.tars import _expand_braces

    assert _expand_braces("{08..11}.tar") == ["08.tar", "09.tar", "10.tar", "11.tar"]
    assert _expand_braces("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_truncated_tar_ends_with_a_rejection(tmp_path, mode):
    suffix = {"w": "tar", "w:gz": "tar.gz", "w:xz": "tar.xz"}[mode]
    noise = [(f"{n:04d}.png", os.urandom(3000)) for n in range(20)]
    whole = write_tar(tmp_path / f"whole.{suffix}", noise, mode).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for part in (0.05, 0.3, 0.5, 0.7, 0.85):
        cut.write_bytes(whole[: int(len(whole) * part)])
        found = entries(open_images(ImageCollection(str(cut))))
        good = [(item.id, item.value) for item in found[:-1]]
        assert good == [(f"cut/{name[:4]}", content) for name, content in noise[: len(good)]]
        assert isinstance(found[-1], Rejected)
        assert found[-1].id == "cut"
        assert f"cannot be read beyond its first {len(good)} samples" in found[-1].reason
        for start in range(len(found)):
            assert entries(open_images(ImageCollection(str(cut))), start=start) == found[start:]
    assert len(good) > 10


def test_a_tar_cut_between_two_members_is_noticed(tmp_path):
    """tarfile itself reads this as the end."""
    with tarfile.open(write_tar(tmp_path / "a.tar", samples(4))) as archive:
        offset = archive.getmember("0002.png").offset
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:offset])
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert len(archive.getnames()) == 4
    *good, last = entries(open_images(ImageCollection(str(tmp_path / "a.tar"))))
    assert ids(good) == ["a/0000", "a/0001"]
    assert "beyond its first 2 samples" in last.reason


def test_a_damaged_header_in_the_middle(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(4))
    with tarfile.open(path) as archive:
        offset = archive.getmember("0002.png").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 300] = b"\xee" * 300
    path.write_bytes(data)
    *good, last = entries(open_images(ImageCollection(str(path))))
    assert (ids(good), last.id) == (["a/0000", "a/0001"], "a")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, bytes(100), b"\x1f\x8b\x08junk"])
def test_a_file_that_is_not_a_tar_is_rejected(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    (entry,) = entries(open_images(ImageCollection(str(tmp_path / "x.tar"))))
    assert entry.id == "x"
    assert "cannot be read beyond its first 0 samples" in entry.reason


def test_an_empty_tar_has_no_entries(tmp_path):
    path = write_tar(tmp_path / "x.tar", [])
    assert entries(open_images(ImageCollection(str(path)))) == []


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_zeros_in_the_middle_are_not_the_end(tmp_path, mode):
    """A partial download into a sparse file has such zeros; tar itself stops there silently."""
    noise = [(f"{n:04d}.png", os.urandom(3000).replace(b"\0", b"x")) for n in range(20)]
    plain = write_tar(tmp_path / "plain.tar", noise)
    with tarfile.open(plain) as archive:
        offset = archive.getmember("0007.png").offset
    data = bytearray(plain.read_bytes())
    data[offset : offset + 4096] = bytes(4096)
    path = tmp_path / f"a.tar{'.' + mode[2:] if mode != 'w' else ''}"
    path.write_bytes(PACK[mode](bytes(data)))
    *good, last = entries(open_images(ImageCollection(str(path))))
    assert ids(good) == [f"a/{n:04d}" for n in range(7)]
    assert isinstance(last, Rejected)
    assert last.id == "a"
    assert f"the end mark at byte {offset} is followed by data at byte {offset + 4096}" in last.reason
    assert "tar --ignore-zeros" in last.reason
    for start in range(9):
        assert entries(open_images(ImageCollection(str(path))), start=start) == [*good, last][start:]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_concatenated_tars_do_not_end_silently(tmp_path, mode):
    suffix = f"tar.{mode[2:]}" if mode != "w" else "tar"
    halves = [write_tar(tmp_path / f"{n}.{suffix}", samples(5, 5 * n), mode).read_bytes() for n in range(2)]
    (tmp_path / f"both.{suffix}").write_bytes(b"".join(halves))
    *good, last = entries(open_images(ImageCollection(str(tmp_path / f"both.{suffix}"))))
    assert ids(good) == [f"both/{n:04d}" for n in range(5)]
    assert "is followed by data" in last.reason
    captions = entries(open_captions(CaptionSource(str(tmp_path / f"both.{suffix}"))))
    assert isinstance(captions[-1], Rejected)


@pytest.mark.parametrize("padding", [0, 512, 10240 * 3, (1 << 20) + 512, 5 << 20])
def test_padding_after_the_end_is_valid(tmp_path, padding):
    path = write_tar(tmp_path / "a.tar", samples(3))
    members = path.read_bytes().rstrip(b"\0")
    path.write_bytes(members + bytes(-len(members) % 512 + 1024 + padding))
    assert all(isinstance(entry, Item) for entry in entries(open_images(ImageCollection(str(path)))))
    path.write_bytes(path.read_bytes() + b"x")
    *good, last = entries(open_images(ImageCollection(str(path))))
    assert len(good) == 3
    assert "is followed by data" in last.reason


def test_packed_tars_of_several_streams_are_read_through(tmp_path):
    """bgzip, pbzip2 and pixz write such files; a gzip checksum error is recorded as rejected."""
    whole = write_tar(tmp_path / "a.tar", [(f"{n}.png", os.urandom(3000)) for n in range(9)]).read_bytes()
    for mode in ("w:gz", "w:bz2", "w:xz"):
        path = tmp_path / f"a.tar.{mode[2:]}"
        path.write_bytes(PACK[mode](whole[:10_000]) + PACK[mode](whole[10_000:]))
        found = entries(open_images(ImageCollection(str(path))))
        assert [item.value for item in found] == [
            item.value for item in entries(open_images(ImageCollection(str(tmp_path / "a.tar"))))
        ]
    packed = bytearray(gzip.compress(whole))
    packed[-8] ^= 1
    (tmp_path / "b.tar.gz").write_bytes(packed)
    *good, last = entries(open_images(ImageCollection(str(tmp_path / "b.tar.gz"))))
    assert len(good) == 9
    assert "CRC check failed" in last.reason


def test_a_tar_that_is_missing_stops_the_job(tmp_path):
    """As a rejected entry, it would count as one item and never be read again."""
    write_tar(tmp_path / "0.tar", samples(1))
    write_tar(tmp_path / "1.tar", samples(1))
    with pytest.raises(DataError, match=r"2 of the 4 tar files .* are missing, first .*/2\.tar; .*a glob"):
        open_images(ImageCollection(f"{tmp_path}/{{0..3}}.tar"))
    source = open_images(ImageCollection(f"{tmp_path}/{{0..1}}.tar"))
    (tmp_path / "1.tar").rename(tmp_path / "away")
    assert len(entries(source, 0)) == 1
    with pytest.raises(DataError, match=r"1\.tar is not there any more; put it back and run the same"):
        entries(source, 1)
    (tmp_path / "2.tar").mkdir()
    (folder,) = entries(open_images(ImageCollection(f"{tmp_path}/{{0,2}}.tar")), 1)
    assert "IsADirectoryError" in folder.reason


def test_a_tar_without_read_permission_is_rejected(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", samples(1))
    source = open_images(ImageCollection(f"{tmp_path}/0.tar"))

    def refuse(*arguments):  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fsspec, "open", refuse)
    (entry,) = entries(source)
    assert "Permission denied" in entry.reason
    source.parts[0].url = "s3://bucket/0.tar"  # remote file systems raise this for an expired session
    with pytest.raises(DataError, match="cannot be read"):
        entries(source)


def test_odd_samples(tmp_path):
    members = [
        ("a.png", picture(0)),
        ("a.json", b"{}"),
        ("b.txt", b"no image"),
        ("c.png", picture(1)),
        ("c.jpg", picture(2)),  # a second image of one sample
        ("d.seg.png", picture(3)),  # the suffix is seg.png
        ("a.png", picture(4)),  # a repeated key
        ("x/e.PNG", picture(5)),
        ("__meta__.json", b"{}"),
        (".f.png", picture(6)),
    ]
    found = entries(open_images(ImageCollection(str(write_tar(tmp_path / "t.tar", members)))))
    assert [(entry.id, isinstance(entry, Item)) for entry in found] == [
        ("t/a", True), ("t/b", False), ("t/c", True), ("t/c#2", False), ("t/d", False), ("t/a#2", False),
        ("t/x/e", True),
    ]  # fmt: skip
    assert len(set(ids(found))) == len(found)
    assert "the sample holds no image file" in found[1].reason
    assert "has the key of an earlier sample" in found[3].reason


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("connection reset by peer"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),  # as some file systems raise it
        OSError(errno.EIO, "Input/output error"),
        EOFError("ended early"),
        MemoryError(),
    ],
)
def test_a_network_that_fails_stops_the_job(tmp_path, monkeypatch, mode, error):
    """As rejected entries, an hour without network would lose the rest of every tar."""
    noise = [(f"{number}.png", os.urandom(3000)) for number in range(4)]
    path = write_tar(tmp_path / "a.tar", noise, mode)
    source = open_images(ImageCollection(str(path)))

    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 2000:
                raise error
            return super().read(min(size, 512) if size > 0 else 512)

    monkeypatch.setattr(fsspec, "open", lambda *arguments: Failing(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.tar cannot be read .*run the same command again"):
        entries(source)


def test_the_same_tar_twice_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", samples(1))
    with pytest.raises(DataError, match="the tar file a is named twice"):
        open_images(ImageCollection(f"{tmp_path}/{{a,a}}.tar"))


def test_a_tar_that_was_replaced_is_another_source(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(4))
    write_tar(tmp_path / "1.tar", samples(2, first=4))
    for pattern in (f"{tmp_path}/*.tar", f"{tmp_path}/{{0..1}}.tar", f"file://{tmp_path}/*.tar"):
        begun = open_images(ImageCollection(pattern)).digest()
        assert open_images(ImageCollection(pattern)).digest() == begun
        digest = open_captions(CaptionSource(pattern)).digest()
        write_tar(path, samples(4, first=9))
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        assert open_images(ImageCollection(pattern)).digest() != begun
        assert open_captions(CaptionSource(pattern)).digest() != digest


def test_a_job_does_not_mix_the_samples_of_two_tars(spec, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", samples(25))

    def stop(*arguments):
        raise DataError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(work._Writer, "_write", stop)
        with pytest.raises(DataError, match="stopped"):
            embed(config(spec, tmp_path / "out", path))
    write_tar(path, samples(25, first=100))
    with pytest.raises(DataError, match=r"0\.tar has changed since .*--overwrite"):
        embed(config(spec, tmp_path / "out", path))
    assert embed(config(spec, tmp_path / "out", path, overwrite=True)).ids[0] == "0/0100"


def test_a_remote_tar_that_was_replaced_is_another_source(monkeypatch):
    files = fsspec.filesystem("memory")
    state = {"size": 100, "ETag": "one", "type": "file"}
    monkeypatch.setattr(type(files), "info", lambda self, path, **options: {"name": path, **state})
    begun = open_images(ImageCollection("memory://a/{0..1}.tar")).digest()
    assert open_images(ImageCollection("memory://a/{0..1}.tar")).digest() == begun
    for other in ({"ETag": "two"}, {"size": 101}):
        with monkeypatch.context() as patch:
            for key, changed in other.items():
                patch.setitem(state, key, changed)
            assert open_images(ImageCollection("memory://a/{0..1}.tar")).digest() != begun
