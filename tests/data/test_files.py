import gzip
import os
import unicodedata

import pytest

from xbt.data.files import find_file, name_within, parse_json, read_text
from xbt.errors import DataError

FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@pytest.mark.parametrize("on_disk", FORMS)
@pytest.mark.parametrize("asked", FORMS)
def test_finds_a_file_by_any_normal_form_of_its_name(tmp_path, on_disk, asked):
    name = "Señales/ﬁguras/år 1Å.jpg"
    there = tmp_path / unicodedata.normalize(on_disk, name)
    there.parent.mkdir(parents=True)
    there.write_bytes(b"1")
    assert find_file(tmp_path, unicodedata.normalize(asked, name)) == there
    assert find_file(tmp_path, unicodedata.normalize(asked, "Señales/ﬁguras/år 2Å.jpg")) is None


def test_finds_a_name_whose_parts_are_in_different_forms(tmp_path):
    folder = tmp_path / unicodedata.normalize("NFD", "ñ")
    folder.mkdir()
    (folder / unicodedata.normalize("NFC", "ñ.png")).write_bytes(b"1")
    assert find_file(tmp_path, "ñ/n\u0303.png") is not None


def test_prefers_the_exact_name_to_other_forms(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "é.png")).write_bytes(form.encode())
    for form in ("NFC", "NFD"):
        found = find_file(tmp_path, unicodedata.normalize(form, "é.png"))
        assert found is not None
        assert found.read_bytes() == form.encode()


def test_does_not_guess_between_two_files_of_one_compatible_form(tmp_path):
    for name in ("x²é.png", "x₂é.png"):
        (tmp_path / name).write_bytes(b"1")
    assert find_file(tmp_path, "x2é.png") is None


@pytest.mark.parametrize("name", ["", ".", "\x00", "\ud83d.jpg", "a" * 5_000, "there.txt/x.jpg", "‥/x.jpg"])
def test_a_name_of_no_file_is_none(tmp_path, name):
    (tmp_path / "there.txt").write_bytes(b"1")
    assert find_file(tmp_path, name) is None
    assert find_file(tmp_path / "absent", "é.jpg") is None


@pytest.mark.parametrize(
    "name", ["../x.jpg", "..", "a/../../x.jpg", "/etc/hostname", "//etc/passwd", "./../x"]
)
def test_refuses_names_that_leave_the_folder(tmp_path, name):
    with pytest.raises(DataError, match=r"record 4 names the file .* outside of the folder .*; write names"):
        find_file(tmp_path, name, "record 4")


def test_names_that_stay_in_the_folder(tmp_path):
    assert name_within(tmp_path, "a/../b.jpg") == "b.jpg"
    assert name_within(tmp_path, "./b..c.jpg") == "b..c.jpg"
    assert name_within(tmp_path, f"{tmp_path}/a/b.jpg") == "a/b.jpg"
    assert name_within("/", "/a/b.jpg") == "a/b.jpg"


def test_a_file_that_unpacks_beyond_its_limit_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("xbt.data.files.FREE_UNPACKED", 1 << 20)
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(bytes(3 << 20)))
    with pytest.raises(DataError, match=r"unpacks to more than 1,048,576 bytes.*gunzip"):
        read_text(path)


def test_reads_packed_files_of_several_members_and_of_a_high_ratio(tmp_path):
    path = tmp_path / "captions.txt.GZ"
    path.write_bytes(gzip.compress(b"a" * 10_000_000) + gzip.compress("é".encode()))
    assert len(read_text(path)) == 10_000_001


def test_refuses_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="is a pipe or device; give a regular file"):
        read_text(tmp_path / "pipe.txt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5_000, "limit"),
        (b'"\xff"', "not UTF-8"),
        ("[\n1,\n2", r"line 9: not valid JSON \(Expecting"),
    ],
)
def test_json_that_cannot_be_parsed_is_one_sentence(text, reason):
    with pytest.raises(DataError, match=reason):
        parse_json(text, "a.json", first_line=7)
