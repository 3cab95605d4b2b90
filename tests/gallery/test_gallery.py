from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xbt.errors import DataError, SpaceMismatchError
from xbt.gallery import Gallery
from xbt.gallery import gallery as module
from xbt.space import EmbeddingSpace


def unit(n, dim, seed=0):
    vectors = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def names(n, start=0):
    return [f"image-{i:04d}" for i in range(start, start + n)]


def make_space(model="old", dim=16, seed=0):
    return EmbeddingSpace(model, dim, {"backend": "pil"}, unit(20, dim, seed))


def brute_force(vectors, ids, queries, k):
    """Scores in double precision; equal ones in the gallery's order."""
    scores = np.asarray(queries, np.float64) @ np.asarray(vectors, np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [[ids[i] for i in row] for row in order], np.take_along_axis(scores, order, axis=1)


@pytest.fixture
def gallery():
    return Gallery.build(unit(50, 16), names(50), make_space())


@pytest.mark.parametrize("n_queries", [1, 5, 64])
@pytest.mark.parametrize("k", [1, 10, 497, 500])
def test_agrees_with_brute_force(n_queries, k):
    vectors, queries, ids = unit(500, 33), unit(n_queries, 33, seed=1), names(500)
    result = Gallery.build(vectors, ids).search(queries, k=k)
    expected_ids, expected_scores = brute_force(vectors, ids, queries, k)
    assert result.ids == expected_ids
    assert result.scores.shape == (n_queries, k)
    assert result.scores.dtype == np.float32
    np.testing.assert_allclose(result.scores, expected_scores, atol=1e-6)


def test_scores_are_inner_products_as_given():
    gallery = Gallery.build(np.array([[1.0, 0.0], [5.0, 5.0]]), ["short", "long"])
    result = gallery.search(np.array([[1.0, 0.0]], np.float16), k=2)
    assert result.ids == [["long", "short"]]
    assert result.scores.tolist() == [[5.0, 1.0]]


def test_a_single_query_vector(gallery):
    query = unit(1, 16, seed=5)
    alone = gallery.search(query[0], k=3)
    assert alone.ids == gallery.search(query, k=3).ids
    assert gallery.search(query[0].numpy(), k=3).ids == alone.ids


def test_a_query_gives_the_same_alone_and_in_a_batch():
    gallery = Gallery.build(unit(3000, 65), names(3000))
    queries = unit(100, 65, seed=2)
    together = gallery.search(queries, k=20)
    for i in (0, 37, 99):
        alone = gallery.search(queries[i], k=20)
        assert alone.ids[0] == together.ids[i]
        assert np.array_equal(alone.scores[0], together.scores[i])


@pytest.mark.parametrize("n_queries", [1, 40])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_equal_vectors_stand_in_the_order_of_the_gallery(n_queries, k):
    # More copies than k and the spare candidates together, between other vectors, for both kernels of FAISS.
    vectors = unit(1000, 65).numpy()
    copies = np.sort(np.random.default_rng(0).permutation(1000)[:60])
    vectors[copies] = vectors[copies[0]]
    queries = np.repeat(vectors[copies[:1]], n_queries, axis=0)
    ids = names(1000)
    result = Gallery.build(vectors, ids).search(queries, k=k)
    assert result.ids == [[ids[i] for i in copies[:k]]] * n_queries
    assert len(set(result.scores.ravel().tolist())) == 1


@pytest.mark.parametrize("n_queries", [1, 40])
@pytest.mark.parametrize(("better", "k"), [(3, 4), (12, 17), (20, 25)])
def test_better_items_that_come_late_do_not_disturb_the_order_of_equal_ones(n_queries, better, k):
    # FAISS lets a better item push out the earliest of the equal ones it holds.
    vectors = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    vectors[:, 0] = 0
    copies = np.arange(100, 900, 10)
    vectors[copies] = np.eye(8)[0]
    vectors[-better:] = 2 * np.eye(8)[0]
    ids = names(1000)
    queries = np.repeat(np.eye(8)[:1], n_queries, axis=0)
    result = Gallery.build(vectors, ids).search(queries, k=k)
    assert result.ids == [ids[-better:] + [ids[i] for i in copies[: k - better]]] * n_queries


def test_a_gallery_of_one_vector_repeated():
    gallery = Gallery.build(np.repeat(unit(1, 64).numpy(), 100, axis=0), names(100))
    assert gallery.search(unit(3, 64, seed=1), k=4).ids == [names(4)] * 3
    assert gallery.search(unit(3, 64, seed=1), k=100).ids == [names(100)] * 3


def test_candidates_are_scored_in_bounded_parts(gallery, monkeypatch):
    queries = unit(7, 16, seed=3)
    whole = gallery.search(queries, k=5)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1)
    parts = gallery.search(queries, k=5)
    assert parts.ids == whole.ids
    assert np.array_equal(parts.scores, whole.scores)


def test_add(gallery):
    more = unit(20, 16, seed=9)
    gallery.add(more, names(20, start=50), make_space())
    assert len(gallery) == 70
    assert gallery.ids == names(70)
    vectors = torch.cat([unit(50, 16), more])
    queries = unit(4, 16, seed=1)
    assert gallery.search(queries, k=10).ids == brute_force(vectors, names(70), queries, 10)[0]


def test_build_copies_the_vectors():
    vectors = unit(3, 4)
    gallery = Gallery.build(vectors, names(3))
    before = gallery.search(torch.ones(4), k=3)
    vectors.zero_()
    assert np.array_equal(gallery.search(torch.ones(4), k=3).scores, before.scores)


def test_describes_itself(gallery):
    assert (len(gallery), gallery.dim, gallery.ids[3]) == (50, 16, "image-0003")
    assert repr(gallery) == "Gallery(50 items, space='old' (16-d))"


def test_importing_and_building_leaves_faiss_alone():
    code = (
        "import sys, numpy as np; from xbt.gallery import Gallery; g = Gallery.build(np.eye(3), list('abc'));"
        "assert 'faiss' not in sys.modules; print(g.search(np.eye(3)[1], k=1).ids)"
    )
    assert run(code) == "[['b']]"


# -- saving and opening --------------------------------------------------------------------------------


def run(code):
    """Runs Python code in a fresh process from the repository's root."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_save_and_open_in_a_fresh_process(gallery, tmp_path):
    gallery.ids[0] = "søk \udc80 ☃"  # ids may be file names that are no valid UTF-8
    gallery.save(tmp_path / "deep" / "gallery")
    queries = unit(6, 16, seed=4)
    np.save(tmp_path / "queries.npy", queries.numpy())
    expected = gallery.search(queries, k=5)
    code = f"""
import json, numpy as np
from xbt.gallery import Gallery
gallery = Gallery.open({str(tmp_path / "deep" / "gallery")!r})
result = gallery.search(np.load({str(tmp_path / "queries.npy")!r}), k=5)
print(json.dumps([gallery.ids, result.ids, result.scores.tolist(), gallery.space.model]))
"""
    ids, found, scores, model = json.loads(run(code))
    assert ids == gallery.ids
    assert found == expected.ids
    assert scores == expected.scores.tolist()
    assert model == "old"
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["gallery"]


def test_the_space_survives(gallery, tmp_path):
    gallery.save(tmp_path / "g")
    opened = Gallery.open(tmp_path / "g")
    opened.search(unit(1, 16), space=make_space("another name, same probe"))
    with pytest.raises(SpaceMismatchError):
        opened.search(unit(1, 16), space=make_space(seed=1))
    Gallery.build(unit(2, 4), names(2)).save(tmp_path / "unknown")
    assert Gallery.open(tmp_path / "unknown").space is None


def test_save_replaces_a_gallery(gallery, tmp_path):
    gallery.save(tmp_path / "g")
    gallery.add(unit(1, 16, seed=8), ["new"])
    gallery.save(tmp_path / "g")
    assert Gallery.open(tmp_path / "g").ids == gallery.ids
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_save_through_a_link_replaces_what_it_points_to(gallery, tmp_path):
    gallery.save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    gallery.add(unit(1, 16, seed=8), ["new"])
    gallery.save(tmp_path / "link")
    assert len(Gallery.open(tmp_path / "real")) == len(Gallery.open(tmp_path / "link")) == 51


@pytest.mark.parametrize("broken", ["_write", "write_text", "first rename", "second rename"])
def test_a_failing_save_leaves_the_old_gallery(gallery, tmp_path, monkeypatch, broken):
    target = tmp_path / "g"
    gallery.save(target)
    old_ids = list(gallery.ids)
    gallery.add(unit(1, 16, seed=8), ["new"])
    renames = []
    rename = Path.rename

    def failing_rename(self, other):
        renames.append(self.name)
        if len(renames) == (1 if broken == "first rename" else 2):
            raise KeyboardInterrupt
        return rename(self, other)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if broken == "_write":
            patch.setattr(Gallery, "_write", fail)
        elif broken == "write_text":
            patch.setattr(Path, "write_text", fail)  # after the vectors are written
        else:
            patch.setattr(Path, "rename", failing_rename)
        with pytest.raises((OSError, KeyboardInterrupt)):
            gallery.save(target)
    assert Gallery.open(target).ids == old_ids
    gallery.save(target)
    assert Gallery.open(target).ids == gallery.ids
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_a_kill_after_the_exchange_leaves_the_new_gallery(gallery, tmp_path):
    gallery.save(tmp_path / ".g.previous")
    gallery.add(unit(1, 16, seed=8), ["new"])
    gallery.save(tmp_path / "g")
    assert len(Gallery.open(tmp_path / "g")) == 51
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_save_refuses_to_replace_other_files(gallery, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt is not part of a gallery"):
        gallery.save(tmp_path)
    with pytest.raises(DataError, match=r"notes\.txt is not part of a gallery"):
        gallery.save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    gallery.save(tmp_path / "empty")
    assert len(Gallery.open(tmp_path / "empty")) == 50


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(d / "vectors.npy"), r"vectors\.npy cannot be read"),
        (lambda d: (d / "vectors.npy").write_bytes(b""), r"vectors\.npy cannot be read"),
        (lambda d: (d / "vectors.npy").unlink(), r"vectors\.npy cannot be read"),
        (lambda d: np.save(d / "vectors.npy", np.array([{}] * 50)), r"vectors\.npy cannot be read"),
        (
            lambda d: np.save(d / "vectors.npy", np.ones((49, 16), np.float32)),
            r"vectors\.npy does not hold 50 x 16",
        ),
        (lambda d: np.save(d / "vectors.npy", np.ones((50, 16))), r"vectors\.npy does not hold .* float32"),
        (
            lambda d: np.save(d / "vectors.npy", np.full((50, 16), np.nan, np.float32)),
            r"vectors\.npy has NaN",
        ),
        (lambda d: truncate(d / "ids.json"), r"ids\.json cannot be read"),
        (lambda d: (d / "ids.json").write_text('["a"]'), r"ids\.json does not hold the 50 ids"),
        (lambda d: (d / "ids.json").write_text(json.dumps(["a"] * 50)), r"ids\.json has 'a' twice"),
        (lambda d: (d / "ids.json").write_text(json.dumps(list(range(50)))), r"ids\.json\[0\] is 0"),
        (lambda d: truncate(d / "gallery.json"), r"gallery\.json cannot be read"),
        (lambda d: (d / "gallery.json").write_text("[]"), r"gallery\.json has format None"),
        (lambda d: edit(d / "gallery.json", format=99), r"gallery\.json has format 99, .* reads 1"),
        (lambda d: edit(d / "gallery.json", count=None), r"gallery\.json is damaged"),
        (lambda d: edit(d / "gallery.json", space={"model": "x"}), r"gallery\.json is damaged"),
        (
            lambda d: edit(d / "gallery.json", space={"model": "x", "dim": 7}),
            r"gallery\.json gives dimension 16 but",
        ),
    ],
)
def test_open_names_the_damaged_file(gallery, tmp_path, damage, message):
    gallery.save(tmp_path / "g")
    damage(tmp_path / "g")
    with pytest.raises(DataError, match=message):
        Gallery.open(tmp_path / "g")


def test_open_refuses_a_directory_without_a_gallery(tmp_path):
    with pytest.raises(DataError, match=r"gallery\.json cannot be read"):
        Gallery.open(tmp_path / "nowhere")


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3", None])
def test_refuses_bad_k(gallery, k):
    with pytest.raises(DataError, match="integer of at least 1"):
        gallery.search(unit(1, 16), k=k)


def test_refuses_k_beyond_the_gallery(gallery):
    with pytest.raises(DataError, match="k is 51, but the gallery has 50 items"):
        gallery.search(unit(1, 16), k=51)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b"], "2 entries for 3 vectors"),
        (["a", "b", "a"], "'a' twice"),
        (["a", 2, "c"], r"ids\[1\] is 2; ids must be strings"),
        ("abc", "ids is the string 'abc'"),
    ],
)
def test_refuses_bad_ids(ids, message):
    with pytest.raises(DataError, match=message):
        Gallery.build(unit(3, 4), ids)


def test_build_refuses_bad_vectors():
    with pytest.raises(DataError, match="gallery vectors is empty"):
        Gallery.build(torch.empty(0, 4), [])
    with pytest.raises(DataError, match=r"gallery vectors has NaN .* row 1"):
        Gallery.build(torch.tensor([[1.0], [float("nan")]]), ["a", "b"])
    with pytest.raises(DataError, match=r"shape \(n, dim\)"):
        Gallery.build(torch.ones(3), ["a"])
    with pytest.raises(DataError, match="scores would overflow"):
        Gallery.build(np.array([[1e300]]), ["a"])
    with pytest.raises(SpaceMismatchError, match="dimension 4, but 16 is needed"):
        Gallery.build(unit(3, 4), names(3), make_space())


def test_search_refuses_bad_queries(gallery):
    with pytest.raises(SpaceMismatchError, match="query vectors has dimension 8, but 16"):
        gallery.search(unit(1, 8))
    with pytest.raises(DataError, match="query vectors has NaN"):
        gallery.search(torch.full((16,), float("nan")))
    with pytest.raises(DataError, match="query vectors is empty"):
        gallery.search(torch.empty(0, 16))


def test_a_foreign_space_is_refused_and_nothing_is_added(gallery):
    foreign = make_space("new", seed=1)
    with pytest.raises(SpaceMismatchError, match=r"query vectors .*'new'.*'old'"):
        gallery.search(unit(1, 16), space=foreign)
    with pytest.raises(SpaceMismatchError, match=r"vectors to add .*'new'.*'old'"):
        gallery.add(unit(1, 16), ["x"], foreign)
    assert len(gallery) == 50


def test_a_gallery_of_unknown_space_still_checks_the_dimension():
    gallery = Gallery.build(unit(3, 4), names(3))
    gallery.search(unit(1, 4), k=1, space=make_space(dim=4))
    with pytest.raises(SpaceMismatchError, match="gallery has dimension 4"):
        gallery.search(unit(1, 16), k=1, space=make_space())


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (unit(2, 16), ["x", "image-0007"], "'image-0007' is already in the gallery"),
        (unit(2, 16), ["x", "x"], "'x' twice"),
        (unit(2, 8), ["x", "y"], "dimension 8, but 16"),
        (torch.full((1, 16), float("inf")), ["x"], "NaN or infinite"),
    ],
)
def test_a_refused_add_leaves_the_gallery_as_it_was(gallery, vectors, ids, message):
    with pytest.raises((DataError, SpaceMismatchError), match=message):
        gallery.add(vectors, ids)
    assert len(gallery) == len(gallery.ids) == 50
    assert gallery.search(unit(1, 16), k=50).scores.shape == (1, 50)
