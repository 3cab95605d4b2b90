"""``xbt search``: who makes the queries, where they come from, and what is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from backfills import SCENES
from fuzzing import damaged, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.backfill import save_merge
from xbt.cli.search import Queries, read_queries
from xbt.compatible import CompatibleEncoder, load_upgraded
from xbt.encoders import load_encoder
from xbt.index import AffineMerge, Gallery, RankMerge, RawMerge
from xbt.projections import Projection, QueryEnsemble
from xbt.projections.combinations import Nlerp

TEXTS = ["a red circle", "two men: a dog, [a cat]", "null"]


def found(result):
    """Ids and scores of every query."""
    queries = result.document["queries"]
    return (
        [[each["id"] for each in query["results"]] for query in queries],
        [[each["score"] for each in query["results"]] for query in queries],
    )


def assert_same(result, expected):
    assert result.status == 0, result.err
    ids, scores = found(result)
    assert ids == expected.ids
    np.testing.assert_allclose(scores, expected.scores, atol=1e-6)
    assert [each["rank"] for each in result.document["queries"][0]["results"]] == list(
        range(1, len(ids[0]) + 1)
    )


@pytest.fixture
def half_backfilled(gallery, new):
    """The gallery with every other item in its new part, and how it is merged."""
    made = Gallery.open(gallery)
    made.begin_part(new.space)
    made.backfill(new.encode_images([SCENES.image(row) for row in range(0, 60, 2)]), SCENES.ids[::2])
    made.close()
    return gallery


def test_words_are_queries(run, gallery, specs, old):
    result = run("search", *TEXTS, "--gallery", gallery, "--encoder", specs[0], "--k", "7", "--json")
    assert_same(result, Gallery.open(gallery).search(old.encode_texts(TEXTS), 7, old.space))
    assert [each["query"] for each in result.document["queries"]] == TEXTS
    assert {each["modality"] for each in result.document["queries"]} == {"text"}


def test_the_table(run, gallery, specs, old):
    result = run("search", "--gallery", gallery, "--encoder", specs[0], "--k", "10", *TEXTS[:2])
    expected = Gallery.open(gallery).search(old.encode_texts(TEXTS[:2]), 10, old.space)
    first, second = result.out.rstrip("\n").split("\n\n")
    for block, text, ids, scores in zip((first, second), TEXTS, expected.ids, expected.scores, strict=False):
        heading, *rows = block.splitlines()
        assert heading == text
        assert [row.split() for row in rows] == [
            [str(rank), f"{score:.4f}", item]
            for rank, item, score in zip(range(1, 11), ids, scores, strict=True)
        ]


@pytest.mark.parametrize("words", [["-"], ["--queries.file", "-"]])
def test_queries_from_standard_input(run, gallery, specs, old, words):
    lines = "\n".join(["", *TEXTS, "  "])
    result = run("search", "--gallery", gallery, "--encoder", specs[0], "--json", *words, stdin=lines)
    assert_same(result, Gallery.open(gallery).search(old.encode_texts(TEXTS), 10, old.space))


def test_all_sources_of_queries_together(run, gallery, specs, old, tmp_path):
    (tmp_path / "queries.txt").write_text("\n".join(TEXTS[1:]), encoding="utf-8-sig")
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    pictures = [tmp_path / name for name in ("photos/a.png", "photos/deeper/b.png", "c.png")]
    for row, path in enumerate(pictures):
        SCENES.image(row).save(path)
    flags = ["--queries.file", tmp_path / "queries.txt",
             "--queries.images", f"[{tmp_path / 'photos'}, {pictures[2]}]"]  # fmt: skip
    result = run("search", TEXTS[0], "--gallery", gallery, "--encoder", specs[0], "--json", *flags)
    vectors = np.concatenate([old.encode_texts(TEXTS), old.encode_images(pictures)])
    assert_same(result, Gallery.open(gallery).search(vectors, 10, old.space))
    assert [each["query"] for each in result.document["queries"]] == [*TEXTS, *map(str, pictures)]
    assert [each["modality"] for each in result.document["queries"]] == ["text"] * 3 + ["image"] * 3
    assert [ids[0] for ids in found(result)[0][3:]] == SCENES.ids[:3]  # a picture finds itself


def test_a_store_is_searched_like_a_gallery(run, gallery, stores, specs):
    words = ["search", "--encoder", specs[0], *TEXTS, "--json"]
    assert found(run(*words, "--gallery", stores / "old_images")) == found(run(*words, "--gallery", gallery))


def test_a_projection_queries_the_old_gallery(run, gallery, specs, new, projection):
    words = ["search", "--gallery", gallery, "--encoder", projection, *TEXTS, "--json"]
    upgraded = CompatibleEncoder(new, Projection.from_pretrained(projection))
    expected = Gallery.open(gallery).search(upgraded.encode_texts(TEXTS), 10, upgraded.space)
    assert_same(run(*words), expected)
    assert_same(run(*words, "--new", specs[1]), expected)


def test_a_compatible_encoder_with_an_ensemble_that_needs_the_old_one(
    run, gallery, specs, new, old, projection, tmp_path
):
    ensemble = QueryEnsemble(old.dim, {"T2I": Nlerp(0.5), "I2T": Nlerp(0.0)}, old_space=old.space)
    path = tmp_path / "compatible"
    upgraded = CompatibleEncoder(new, Projection.from_pretrained(projection), ensemble, old)
    upgraded.save_pretrained(path)
    words = ["search", "--gallery", gallery, "--encoder", path, *TEXTS, "--json"]
    expected = Gallery.open(gallery).search(upgraded.encode_texts(TEXTS), 10, old.space)
    assert_same(run(*words), expected)
    assert_same(run(*words, "--old", specs[0]), expected)
    result = run(*words, "--old", specs[1])
    assert result.status == 2
    assert "old encoder" in result.err


def test_a_recorded_model_that_is_gone(run, gallery, specs, projection, tmp_path):
    import shutil

    path = shutil.copytree(projection, tmp_path / "projection")
    config = path / "config.json"
    config.write_text(config.read_text().replace(specs[1], "open_clip:local-dir:/no/model"))
    words = ["search", "--gallery", gallery, "--encoder", path, "a dog"]
    result = run(*words)
    assert result.status == 2
    assert "/no/model" in result.err
    assert "--new" in result.err
    assert run(*words, "--new", specs[1]).status == 0


def test_a_foreign_space_is_refused(run, gallery, specs, tmp_path):
    import tiny

    other = tiny.tiny_open_clip(tmp_path / "other", seed=7, context_length=77)  # of the same dimension
    for spec in (other, specs[1]):
        result = run("search", "a dog", "--gallery", gallery, "--encoder", spec, "--json")
        assert result.status == 2
        assert result.document["error"]["kind"] == "SpaceMismatchError"
        assert spec in result.document["error"]["message"]
        assert specs[0] in result.document["error"]["message"]


@pytest.mark.parametrize(("name", "merge"), [("raw", RawMerge()), ("rank", RankMerge())])
def test_a_mixed_gallery_with_a_merge_by_name(run, half_backfilled, specs, old, new, name, merge):
    flags = ["--encoder", specs[0], "--new", specs[1], "--merge", name, "--k", "20", "--json"]
    result = run("search", "--gallery", half_backfilled, *flags, *TEXTS)
    expected = Gallery.open(half_backfilled).search_mixed(
        old.encode_texts(TEXTS), new.encode_texts(TEXTS), 20, merge, old.space, new.space
    )
    assert_same(result, expected)


def test_a_mixed_gallery_with_its_own_merge(run, half_backfilled, old, new, projection, tmp_path):
    """The compatible encoder's own base makes the new part's queries."""
    save_merge(half_backfilled, AffineMerge(0.7, 0.1))
    result = run("search", "--gallery", half_backfilled, "--encoder", projection, *TEXTS, "--json")
    upgraded = load_upgraded(projection)
    queries = upgraded.encode_texts(TEXTS), new.encode_texts(TEXTS)
    expected = Gallery.open(half_backfilled).search_mixed(
        *queries, 10, AffineMerge(0.7, 0.1), upgraded.space, new.space
    )
    assert_same(result, expected)
    (tmp_path / "merge.json").write_text(json.dumps(RankMerge().to_dict()))
    words = ["search", "--gallery", half_backfilled, "--encoder", projection, *TEXTS, "--json"]
    other = run(*words, "--merge", tmp_path / "merge.json")
    assert found(other) == found(run(*words, "--merge", "rank")) != found(result)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--new", "NEW"], "--merge raw, rank or a file"),
        (["--merge", "rank"], "give its encoder as --new"),
        (["--merge", "rank", "--encoder", "NEW"], "give its encoder as --encoder"),
        (["--merge", "nowhere.json", "--new", "NEW"], "nowhere.json"),
        (["--merge", "rank", "--part", "old"], "--part old searches one"),
        (["--part", "middle"], "no part 'middle'"),
    ],
)
def test_what_a_mixed_gallery_needs(run, half_backfilled, specs, words, message):
    words = [specs[1] if word == "NEW" else word for word in words]
    result = run("search", "a dog", "--gallery", half_backfilled, "--encoder", specs[0], *words)
    assert (result.status, result.out) == (2, "")
    assert message in result.err


def test_one_part_of_a_mixed_gallery(run, half_backfilled, specs, new):
    words = ["search", "--gallery", half_backfilled, "--part", "new", *TEXTS, "--json"]
    expected = Gallery.open(half_backfilled).search(new.encode_texts(TEXTS), 10, new.space, part="new")
    assert_same(run(*words, "--encoder", specs[1]), expected)
    assert_same(run(*words, "--encoder", specs[0], "--new", specs[1]), expected)


@pytest.mark.parametrize("compacted", [False, True])
def test_once_all_is_backfilled_the_new_model_searches(run, half_backfilled, specs, new, compacted):
    made = Gallery.open(half_backfilled)
    made.backfill(new.encode_images([SCENES.image(row) for row in range(1, 60, 2)]), SCENES.ids[1::2])
    if compacted:
        made.compact()
    expected = made.search(new.encode_texts(TEXTS), 10, new.space)
    made.close()
    words = ["search", "--gallery", half_backfilled, *TEXTS, "--json"]
    assert_same(run(*words, "--encoder", specs[1]), expected)
    assert_same(run(*words, "--encoder", specs[0], "--new", specs[1]), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to search for"),
        (["a dog", ""], "query 2 is blank"),
        (["a dog", "--k", "61"], "61"),
        (["a dog", "--k", "0"], "--k must be at least 1"),
        (["a dog", "--gallery", "nowhere"], "nowhere"),
        (["a dog", "--encoder", "no/where/at/all"], "no/where/at/all"),
        (["--queries.file", "nowhere.txt"], "nowhere.txt"),
        (["--queries.images", "nowhere.png"], "nowhere.png"),
        (["-", "--queries.file", "-"], "only once"),
        (["a dog", "--querys.file", "x"], "querys"),
    ],
)
def test_wrong_input_is_one_sentence(run, gallery, specs, words, message):
    result = run("search", "--gallery", gallery, "--encoder", specs[0], *words, stdin="")
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_queries_that_are_no_text(run, gallery, specs, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    for name, message in (("empty.txt", "holds no queries"), ("latin.txt", "latin.txt, line 1: not UTF-8")):
        result = run("search", "--gallery", gallery, "--encoder", specs[0], "--queries.file", tmp_path / name)
        assert result.status == 2
        assert message in result.err


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["a dog", "half \ud83d"], "", r"query 2, 'half \ud83d', is not valid Unicode; write it in UTF-8"),
        (["-"], "a dog\nhalf \ud83d", "standard input, line 2: not UTF-8"),
        (["--queries.file", "\x00"], "", "cannot be read (embedded null byte)"),
        (["--queries.file", "a" * 5_000], "", "cannot be read (File name too long)"),
        (["--queries.file", "/"], "", "cannot be read (Is a directory)"),
        (["--queries.file", "/dev/zero"], "", "holds more than 1,024 bytes"),
    ],
)
def test_odd_bytes_are_one_sentence(run, gallery, specs, monkeypatch, words, stdin, message):
    monkeypatch.setattr("xbt.cli.output._MAX_BYTES", 1024)
    result = run("search", "--gallery", gallery, "--encoder", specs[0], *words, stdin=stdin)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err


@fuzzed
@given(data=st.one_of(st.binary(max_size=200), damaged(b"a dog\r\nein H\xc3\xbcndchen\n")))
def test_fuzz_queries(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "queries.txt"
    path.write_bytes(data)
    loads_or_refuses(lambda: read_queries(Queries(file=str(path))), len(data))


def test_only_line_feeds_end_a_query(tmp_path):
    (tmp_path / "q.txt").write_bytes("one\u2028caption\x0c\r\ntwo\n\n".encode())
    assert read_queries(Queries(file=str(tmp_path / "q.txt"))).texts == ["one\u2028caption", "two"]


def test_as_a_program_between_others(gallery, specs):
    """A real process: queries come through a pipe, and standard output is JSON alone."""
    command = [sys.executable, "-m", "xbt", "search", "-", "--gallery", str(gallery), "--encoder", specs[0]]
    ran = subprocess.run(
        [*command, "--json"], input="a dog\n", capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    encoder = load_encoder(specs[0])
    expected = Gallery.open(gallery).search(encoder.encode_texts(["a dog"]), 10, encoder.space)
    results = json.loads(ran.stdout)["queries"][0]["results"]
    assert [each["id"] for each in results] == expected.ids[0]
