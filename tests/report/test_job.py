"""Reports on worlds of vectors: numbers against independent ones, verdicts, and what cannot be known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from upgrade_worlds import KEYS, N_IMAGES, config_of, write_world

from xbt.data import PairSource
from xbt.errors import ConfigError, DataError, SpaceMismatchError, XbtError
from xbt.evaluation import bootstrap_interval, recall_at_k
from xbt.report import FailUnder, UpgradeReportConfig, VectorSource, write_upgrade_report
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore


def test_the_figures_are_those_of_a_brute_force_search(made):
    report, out = made
    data = json.loads((out / "report.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert (data["schema"], data["schema_version"]) == ("xbt.upgrade_report", 1)
    pairs = report.measured.pairs
    texts_of = [np.flatnonzero(pairs.image_of_text.numpy() == row) for row in range(len(pairs))]
    for name, (texts, images) in {
        "old/old": (pairs.old_texts, pairs.old_images),
        "new/new": (pairs.new_texts, pairs.new_images),
    }.items():
        scores = texts.numpy() @ images.numpy().T
        own = scores[np.arange(len(scores)), pairs.image_of_text.numpy()]
        ranks = (scores >= own[:, None]).sum(axis=1) - 1
        best = np.array([scores[rows, image].max() for image, rows in enumerate(texts_of)])
        wrong = [
            int((np.delete(scores[:, image], rows) >= best[image]).sum())
            for image, rows in enumerate(texts_of)
        ]
        for k in (1, 5, 10):
            cell = data["measured"]["cells"][name]
            assert cell["T2I"][f"R@{k}"]["recall"] == pytest.approx((ranks < k).mean())
            assert cell["I2T"][f"R@{k}"]["recall"] == pytest.approx((np.array(wrong) < k).mean())


def test_the_upgrade_is_what_the_decision_finds_on_images_it_has_not_seen(made):
    report, _ = made
    pairs, decision = report.measured.pairs, report.measured.decision
    queries = decision.queries(pairs.new_texts, pairs.old_texts, "T2I")
    expected = recall_at_k(queries, pairs.old_images, pairs.positives("T2I"))
    assert report.measured.cells["new/old"].t2i == expected
    assert decision.n_images + len(pairs) == N_IMAGES
    gain = report.to_dict()["measured"]["difference_to_old_old"]["new/old"]["T2I"]["R@1"]
    old, new = (report.measured.cells[name].ranks["T2I"] for name in ("old/old", "new/old"))
    change = (new < 1).double() - (old < 1).double()
    assert gain["gain"] == list(bootstrap_interval(change, pairs.image_of_text))
    row = report.rows[0]
    assert row.counts[0] - row.counts[1] == int(change.sum())
    assert row.recovered == pytest.approx((row.upgraded[0] - row.old[0]) / (row.new[0] - row.old[0]))


def test_the_curve_begins_at_new_old_and_ends_at_new_new(made):
    report, _ = made
    for points in report.curve.recall.values():
        for point, cell in ((points[0], "new/old"), (points[-1], "new/new")):
            recall = report.measured.cells[cell].t2i.values()
            assert point.estimate == pytest.approx(sum(recall) / len(recall))


def test_a_much_better_model_is_worth_it(made):
    report, out = made
    assert report.verdict.answer in ("yes", "ensemble")
    assert report.passed
    assert report.format().startswith("Upgrade: ")
    assert {"report.html", "report.json", "config.yaml", "versions.json"} == {p.name for p in out.iterdir()}


def test_examples_are_flips_and_show_what_a_search_finds(made):
    report, _ = made
    flips = report.flips["T2I"]
    pairs, cells = report.measured.pairs, report.measured.cells
    assert flips.fixed
    for example in flips.fixed:
        assert example.old_rank >= 1 > example.new_rank
        assert cells["old/old"].ranks["T2I"][example.query] == example.old_rank
        scores = pairs.old_texts[example.query] @ pairs.old_images.T
        assert list(example.before) == scores.topk(4).indices.tolist()
        assert example.after[0] in example.right
    images = [int(pairs.image_of_text[example.query]) for example in flips.fixed]
    assert len(set(images)) == len(images)
    leaps = [example.old_rank - example.new_rank for example in flips.fixed]
    assert leaps == sorted(leaps, reverse=True)
    assert all(example.old_rank < 1 <= example.new_rank for example in flips.broken)


def test_a_worse_model_is_not(tmp_path):
    file = write_world(tmp_path / "worse.npz", "worse", n_corpus=300)
    report = write_upgrade_report(config_of(file, tmp_path / "out", worthwhile=30.0))
    assert report.verdict.answer == "no"
    assert not report.passed
    # The old query is what stays, so that nothing changes.
    assert report.measured.cells["new/old"].t2i == report.measured.cells["old/old"].t2i


def test_a_sample_too_small_is_said_to_be(tmp_path, better):
    with pytest.warns(UserWarning, match="too small for intervals"):
        report = write_upgrade_report(config_of(better, tmp_path / "out", sample=24))
    assert report.verdict.answer == "unknown"
    assert not report.passed
    assert any("too small for intervals" in limit for limit in report.limits)
    assert report.curve is None
    assert "too small for intervals" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(("sample", "use_old"), [(30, True), (12, True), (6, True), (4, True), (12, False)])
@pytest.mark.parametrize("with_corpus", [False, True])
def test_a_sample_too_small_to_choose_by_is_measured_with_what_needs_no_choice(
    tmp_path, better, sample, use_old, with_corpus
):
    keys = {} if with_corpus else {"old_corpus": None, "new_corpus": None}
    config = config_of(better, tmp_path / "out", sample=sample, use_old=use_old, keys=keys)
    with pytest.warns(UserWarning, match="too small for intervals"):
        report = write_upgrade_report(config)
    assert report.verdict.answer == "unknown"
    assert any("The method was not chosen by comparison" in limit for limit in report.limits)
    decision, pairs = report.measured.decision, report.measured.pairs
    chosen = report.measured.n_chosen
    assert f"{chosen} images are too small a sample to choose by" in report.method[0]
    assert f"fitted to {600 if with_corpus else 5 * chosen} texts" in report.method
    saved = json.loads((tmp_path / "out/report.json").read_text())["measured"]["decision"]
    assert (saved["evidence"], saved["chosen"], saved["candidates"]) == ("none", "procrustes", [])
    new, old = pairs.queries("T2I")
    projected = decision.projection(new, "text")
    expected = torch.nn.functional.normalize(projected + old, dim=1) if use_old else projected
    assert torch.allclose(report.measured.queries["new/old"]["T2I"], expected, atol=1e-5)
    assert "too small a sample to choose by" in (tmp_path / "out/report.html").read_text()


def test_without_new_images_there_are_text_queries_alone(tmp_path, better):
    report = write_upgrade_report(config_of(better, tmp_path / "out", keys={"new_images": None}))
    assert report.measured.directions == ("T2I",)
    assert "new/new" not in report.measured.cells
    assert report.to_dict()["measured"]["recovered_gain"] == {"new/old": None} or all(
        each is None for each in report.to_dict()["measured"]["recovered_gain"].values()
    )
    assert any("the result of re-embedding the gallery are unknown" in limit for limit in report.limits)
    assert "unknown" in report.format()


def test_texts_of_the_sample_are_taken_out_of_the_corpus(tmp_path, better):
    with np.load(better) as file:
        arrays = dict(file)
    for side in ("old", "new"):
        arrays[f"corpus_{side}_text"] = np.concatenate(
            [arrays[f"corpus_{side}_text"], arrays[f"val_{side}_text"]]
        )
    np.savez(tmp_path / "mixed.npz", **arrays)
    report = write_upgrade_report(config_of(str(tmp_path / "mixed.npz"), tmp_path / "out", sample=60))
    assert any("300 texts of the corpus are in the sample" in limit for limit in report.limits)


def test_the_owner_of_texts_may_be_given_and_an_image_without_text_is_left_out(tmp_path, better):
    with np.load(better) as file:
        arrays = dict(file)
    for side in ("old", "new"):
        arrays[f"val_{side}_image"] = np.concatenate(
            [arrays[f"val_{side}_image"], arrays[f"val_{side}_image"][:1]]
        )
    np.savez(tmp_path / "more.npz", **arrays)
    keys = {"image_of_text": "owner"}
    report = write_upgrade_report(config_of(str(tmp_path / "more.npz"), tmp_path / "out", keys=keys))
    assert report.sample.available == N_IMAGES
    assert any("1 images have no text" in limit for limit in report.limits)


def test_a_file_in_half_precision_with_a_corpus_and_photos(tmp_path, better, pictures, made):
    """A file as people share them: fp16, more keys than are asked for, five captions of every photo."""
    with np.load(better) as file:
        arrays = {key: rows if key == "owner" else rows.astype(np.float16) for key, rows in file.items()}
    arrays["train_old_image"] = arrays["train_new_image"] = np.zeros((3, 7), np.float16)
    np.savez(tmp_path / "half.npz", **arrays)
    config = config_of(
        str(tmp_path / "half.npz"), tmp_path / "out", pairs=PairSource(pictures, split="val"), examples=3
    )
    report = write_upgrade_report(config)
    assert report.verdict.answer == made[0].verdict.answer
    for name, cell in made[0].measured.cells.items():
        assert report.measured.cells[name].t2i == pytest.approx(cell.t2i, abs=0.01)
    assert (tmp_path / "out/report.html").read_text().count("data:image/") >= 3


def stores(folder, file, space_of=lambda role: EmbeddingSpace(role.split("_")[0], 0)):
    """The same world as stores; returns their paths by role."""
    paths = {}
    with np.load(file) as arrays:
        for role, key in KEYS.items():
            rows, modality = arrays[key], "image" if role.endswith("images") else "text"
            space = replace(space_of(role), dim=rows.shape[1])
            store = EmbeddingStore.create(folder / role, modality=modality, space=space, dtype="float32")
            store.append(rows, [f"{role.split('_')[1]}-{row}" for row in range(len(rows))])
            paths[role] = str(folder / role)
    return paths


def test_stores_give_the_same_as_a_file(tmp_path, better, made):
    config = config_of(None, tmp_path / "out", keys=stores(tmp_path, better))
    report = write_upgrade_report(replace(config, examples=3))
    for name, cell in made[0].measured.cells.items():
        assert report.measured.cells[name].t2i == pytest.approx(cell.t2i)
    assert report.sample.old.name == "old"
    assert any("is unverified" in limit for limit in report.limits)  # no probe, so names alone
    assert report.shown.shown.ids[0].startswith("images-")


def test_stores_of_different_ids(tmp_path, better):
    paths = stores(tmp_path, better)
    with np.load(better) as arrays:
        rows = arrays["val_new_image"]
    space = EmbeddingSpace("new", rows.shape[1])
    store = EmbeddingStore.create(tmp_path / "other", modality="image", space=space)
    store.append(rows, [f"other-{row}" for row in range(len(rows))])
    with pytest.raises(DataError, match="row 0 has the id 'other-0'"):
        write_upgrade_report(
            config_of(None, tmp_path / "out", keys={**paths, "new_images": str(tmp_path / "other")})
        )
    assert not (tmp_path / "out").exists()


def test_stores_of_another_space(tmp_path, better):
    def space_of(role):
        return EmbeddingSpace("other" if role == "old_texts" else role.split("_")[0], 0)

    with pytest.raises(SpaceMismatchError, match=r"--vectors\.old_texts is 'other'"):
        write_upgrade_report(config_of(None, tmp_path / "out", keys=stores(tmp_path, better, space_of)))


def test_nan_is_named(tmp_path, better):
    with np.load(better) as file:
        arrays = dict(file)
    arrays["val_new_image"][7, 0] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    with pytest.raises(DataError, match="row 7"):
        write_upgrade_report(config_of(str(tmp_path / "nan.npz"), tmp_path / "out"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"old_images": "nothing"}, "neither a key of --vectors.file nor a path that exists"),
        ({"old_images": "nothing.npy"}, "there is no file nothing.npy"),
        ({"image_of_text": "val_old_text"}, "give one whole number"),
        ({"old_images": "owner"}, "vectors are floating point"),
        ({"new_texts": "val_new_image"}, "must be of the same items"),
    ],
)
def test_what_cannot_be_read(keys, words, tmp_path, better):
    with pytest.raises(XbtError, match=words):
        write_upgrade_report(config_of(better, tmp_path / "out", keys=keys))


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "x.npz").write_text("no arrays")
    with pytest.raises(DataError, match=r"x\.npz cannot be read"):
        write_upgrade_report(config_of(str(tmp_path / "x.npz"), tmp_path / "out"))


def test_pictures_that_do_not_go_with_the_vectors(tmp_path, better, pictures):
    with pytest.raises(ConfigError, match=f"--pairs has 50 images and 250 texts for vectors of {N_IMAGES}"):
        write_upgrade_report(
            config_of(better, tmp_path / "out", pairs=PairSource(pictures, split="val", limit=50))
        )


def test_missing_pictures_do_not_stop_the_report(tmp_path, better, pictures):
    pairs = PairSource(pictures, split="val", image_root=str(tmp_path))
    report = write_upgrade_report(config_of(better, tmp_path / "out", pairs=pairs, examples=2))
    assert any("Pictures could not be shown" in limit for limit in report.limits)
    page = (tmp_path / "out/report.html").read_text()
    assert "<img" not in page
    assert "shown 0 times" in page  # the captions stand for the pictures


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample": 3}, "--sample"),
        ({"choose_fraction": 1.0}, "--choose_fraction"),
        ({"confidence": 0.5}, "--confidence"),
        ({"worthwhile": -1.0}, "--worthwhile"),
        ({"ks": [1, 1]}, "--ks"),
        ({"gallery_size": 0}, "--gallery_size"),
        ({"fail_under": FailUnder(k=3)}, "--fail_under.k is 3"),
        ({"old": "open_clip:x"}, "nothing is embedded"),
        ({"keys": {"new_images": None}, "fail_under": FailUnder(I2T=1.0)}, "--fail_under.I2T needs"),
        ({"keys": {"new_images": None}, "fail_under": FailUnder(recovered_gain=1.0)}, "needs new/new"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        config_of("x.npz", "out", **changes)


def test_neither_encoders_nor_vectors():
    with pytest.raises(ConfigError, match="without image–text pairs nothing can be measured"):
        UpgradeReportConfig("out", old="open_clip:x", new="open_clip:y")
    with pytest.raises(ConfigError, match="give both or neither"):
        VectorSource("a", "b", "c", old_corpus="d")
    with pytest.raises(ConfigError, match=r"--fail_under\.T2I"):
        FailUnder(T2I=200)
    with pytest.raises(ConfigError, match=r"--fail_under\.recovered_gain"):
        FailUnder(recovered_gain=float("nan"))


def test_several_processes_are_refused(better, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        write_upgrade_report(config_of(better, tmp_path / "out"))


def test_the_same_seed_gives_the_same_report(made, better, tmp_path):
    again = write_upgrade_report(config_of(better, tmp_path / "out", examples=3)).to_dict()
    first = made[0].to_dict()
    for key in ("verdict", "measured", "backfill_curve"):
        assert json.dumps(again[key]) == json.dumps(first[key])
    assert torch.equal(made[0].measured.pairs.image_of_text, made[0].shown.pairs.image_of_text)
