"""SQL for pgvector, read back by a small reader of what PostgreSQL documents."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from xbt.errors import ConfigError, DataError, StoreError
from xbt.index import Gallery
from xbt.serve import PgvectorTable, export_pgvector
from xbt.serve.export import vector_text
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

UNESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "\\": "\\"}


def statements(sql):
    """Split SQL as psql does: at semicolons outside quotes; after COPY come data, up to backslash-dot."""
    found, place = [], 0
    token = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|;|[^;'\"-]+|-", re.S)
    start = 0
    while place < len(sql):
        match = token.match(sql, place)
        assert match, sql[place : place + 50]
        place = match.end()
        if match[0] == ";":
            statement = re.sub(r"^(\s|--[^\n]*\n)*", "", sql[start:place])
            found.append(statement)
            if statement.startswith("COPY "):
                end = sql.index("\n\\.\n", place)
                found.append(sql[place + 1 : end].split("\n"))
                place = end + 4
            start = place
    assert not sql[start:].strip()
    return found


def copied(field):
    """A field of COPY's text format."""
    if field == "\\N":
        return None
    return re.sub(r"\\(.)", lambda match: UNESCAPED.get(match[1], match[1]), field)


def literal(text):
    """A string literal, standard or with escapes, or NULL."""
    if text.startswith("E"):
        return copied(text[2:-1].replace("''", "'"))
    return None if text == "NULL" else text[1:-1].replace("''", "'")


def read_back(sql):
    """(ids, vectors, metadata) of the rows of an export."""
    rows = []
    for statement in statements(sql):
        if isinstance(statement, list):
            rows += [[copied(field) for field in line.split("\t")] for line in statement]
        elif statement.startswith("INSERT"):
            text = r"(E?'(?:[^']|'')*'|NULL)"
            values = re.findall(rf"\({text}, ('[^']*'), {text}\)", statement)
            rows += [[literal(each) for each in value] for value in values]
    assert all(len(row) == 3 for row in rows)
    vectors = np.array([json.loads(row[1]) for row in rows], dtype=np.float32)
    return [row[0] for row in rows], vectors, [row[2] and json.loads(row[2]) for row in rows]


@pytest.mark.parametrize("statement", ["copy", "insert"])
def test_a_store_comes_back_whole(store, tmp_path, old_space, statement):
    options = PgvectorTable("gallery.photos", "old", statement, rows_at_once=7, index=True)
    assert export_pgvector(store, tmp_path / "gallery.sql", options) == 60
    sql = (tmp_path / "gallery.sql").read_text(encoding="utf-8")
    ids, vectors, metadata = read_back(sql)
    assert ids == store.ids
    assert np.array_equal(vectors, store.read())
    assert metadata == store.metadata().to_pylist()
    texts = [each for each in statements(sql) if isinstance(each, str)]
    assert texts[2:5] == [
        "CREATE EXTENSION IF NOT EXISTS vector;",
        "BEGIN;",
        'CREATE TABLE "gallery"."photos" (\n  "id" text PRIMARY KEY,\n  "old" vector(16) NOT NULL,\n'
        '  "metadata" jsonb\n);',
    ]
    comment = re.fullmatch(r'COMMENT ON COLUMN "gallery"."photos"."old" IS (.*);', texts[5], re.S)
    space = EmbeddingSpace.from_dict(json.loads(literal(comment[1]))["space"])
    assert space.compare(old_space).verified
    assert texts[-2:] == ['CREATE INDEX ON "gallery"."photos" USING hnsw ("old" vector_ip_ops);', "COMMIT;"]
    assert sql.count("INSERT INTO") == (9 if statement == "insert" else 0)


def test_a_part_of_a_gallery_without_metadata(tmp_path, rows, old_space, new_space):
    gallery = Gallery.build(rows(5), list("abcde"), old_space)
    gallery.begin_part(new_space)
    gallery.backfill(rows(2, 24), ["b", "d"], new_space)
    with pytest.raises(DataError, match="3 items in 'old' and 2 items in 'new'"):
        export_pgvector(gallery, tmp_path / "gallery.sql")
    export_pgvector(gallery, tmp_path / "gallery.sql", part="new")
    ids, vectors, metadata = read_back((tmp_path / "gallery.sql").read_text())
    assert (ids, metadata) == (["b", "d"], [None, None])
    assert np.array_equal(vectors, rows(2, 24))


def test_numbers_come_back_the_same():
    tiny = np.float32(1e-45)
    row = np.array([0, -0.0, tiny, -1 / 3, 3.4e38, 1e-7, 16777217, 0.1], dtype=np.float32)
    text = vector_text(row)
    assert re.fullmatch(r"\[[-+0-9.e,]+\]", text)
    assert np.array_equal(np.array(json.loads(text), dtype=np.float32), row)
    many = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    assert np.array_equal(np.array(json.loads(vector_text(many)), dtype=np.float32), many)


@pytest.mark.parametrize(
    ("ids", "metadata", "words"),
    [
        (["a", "b\0c"], None, r"the id 'b\\x00c' holds the character NUL"),
        (["a", "b"], {"x": ["\\u0000", "a\0b"]}, "the metadata of 'b' hold the character NUL"),
        (["a", "b"], {"x": [1.0, float("nan")]}, "the metadata of 'b' have no JSON form"),
        (["a", "b"], {"x": [b"1", b"2"]}, "the metadata of 'a' have no JSON form"),
    ],
)
def test_what_postgresql_cannot_hold_is_refused(tmp_path, rows, old_space, ids, metadata, words):
    store = EmbeddingStore.create(tmp_path / "store", modality="image", space=old_space)
    store.append(rows(2), ids, metadata)
    with pytest.raises(DataError, match=words):
        export_pgvector(store, tmp_path / "out/gallery.sql")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"table": "photos; DROP TABLE x"}, "is no plain SQL name"),
        ({"table": "a.b.c"}, "a.b.c.embedding cannot be made"),
        ({"table": ""}, "'' is no plain SQL name"),
        ({"column": "id"}, "items.id cannot be made"),
        ({"column": "x" * 64}, "at most 63"),
        ({"statement": "upsert"}, "'copy' or 'insert', got 'upsert'"),
        ({"rows_at_once": 0}, "rows_at_once must be at least 1, got 0"),
    ],
)
def test_names_and_values_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        PgvectorTable(**options)


def test_long_vectors_and_bad_places(tmp_path, rows, store):
    long = Gallery.build(rows(2, 2001), ["a", "b"])
    with pytest.raises(ConfigError, match="2001 dimensions, but pgvector indexes at most 2000; leave out"):
        export_pgvector(long, tmp_path / "gallery.sql", PgvectorTable(index=True))
    assert export_pgvector(long, tmp_path / "gallery.sql") == 2
    with pytest.raises(ConfigError, match="16001 dimensions, but pgvector holds at most 16000"):
        export_pgvector(Gallery.build(rows(1, 16_001), ["a"]), tmp_path / "gallery.sql")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        export_pgvector(store, tmp_path / "file/gallery.sql")
