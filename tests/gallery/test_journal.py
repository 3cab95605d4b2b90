"""The file of removals: what is news, what is damage, and whose file it is."""

from __future__ import annotations

import os

import pytest

from xbt.errors import StoreError
from xbt.gallery.journal import Journal


@pytest.fixture
def journal(tmp_path):
    made = Journal.create(tmp_path / "removals-000000.log", {"old-000000": [3]}, "abc", 0)
    assert made.news() == [{"old-000000": [3]}]
    return made


def test_what_is_appended_is_news_to_others_once(journal):
    reader = Journal(journal.path, "abc", journal.least)
    assert reader.news() == [{"old-000000": [3]}]
    journal.append({"old-000000": [4], "new-000001": []})
    assert reader.news() == [{"old-000000": [4]}]
    assert reader.news() == journal.news() == []
    reader.rewind()
    assert reader.news() == [{"old-000000": [3]}, {"old-000000": [4]}]
    assert reader.read == journal.read == journal.path.stat().st_size


def test_a_reader_that_comes_between_half_a_line_and_the_line_in_its_place_reads_again(journal, monkeypatch):
    reader = Journal(journal.path, "abc")
    reader.news()
    journal.append({"old-000000": [4]})
    rest, seen = Journal._rest, []

    def torn(self):
        seen.append(rest(self))
        return b"0" * 8 + seen[0][8:] if len(seen) == 1 else seen[-1]

    monkeypatch.setattr(Journal, "_rest", torn)
    assert reader.news() == [{"old-000000": [4]}]
    assert len(seen) == 2


def test_nothing_is_written_to_another_file(journal, tmp_path):
    other = Journal.create(tmp_path / "other", {}, "def", 0)
    content = other.path.read_bytes()
    assert journal.in_place()
    other.path.replace(journal.path)
    assert not journal.in_place()
    with pytest.raises(StoreError, match=r"the gallery at .* was replaced by another while it was open"):
        journal.append({"old-000000": [5]})
    assert journal.path.read_bytes() == content
    assert journal.news() == []  # it goes on reading its own
    with pytest.raises(StoreError, match="is of another gallery; copy the gallery"):
        Journal(journal.path, "abc").news()


def test_nothing_is_written_to_a_file_that_was_cut(journal):
    os.truncate(journal.path, 5)
    with pytest.raises(StoreError, match=r"has 5 bytes, but \d+ were written: removals are lost"):
        journal.append({"old-000000": [5]})
    assert journal.path.stat().st_size == 5


def test_closing_it_twice(journal):
    journal.close()
    journal.close()
    assert journal.closed
    assert not journal.in_place()
