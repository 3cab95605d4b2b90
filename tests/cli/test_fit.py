"""``xbt fit``: from captions, from stores, and by held-out pairs; and ``xbt evaluate`` of what it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from backfills import SCENES
from cli.conftest import TEXTS

from xbt.cli.fit import FitConfig
from xbt.compatible import CompatibleEncoder
from xbt.data import read_captions
from xbt.data.captions import CaptionSource
from xbt.evaluation.job import EvaluationConfig, run_evaluation
from xbt.projections import Projection, SelectionOptions, fit_projection
from xbt.store import EmbeddingStore

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")


@pytest.fixture
def encoders(specs):
    return ["--old", specs[0], "--new", specs[1]]


@pytest.fixture
def captions():
    return ["--captions.source", "scenes", "--captions.limit", "80", "--captions.seed", "1"]


@pytest.fixture
def pairs():
    return ["--pairs.source", "scenes", "--pairs.limit", "24"]


def assert_equal_maps(fitted, expected):
    vectors = torch.eye(fitted.new_dim)
    torch.testing.assert_close(fitted(vectors), expected(vectors), rtol=0, atol=1e-5)


def test_from_two_stores_without_an_encoder(run, stores, old, new, tmp_path):
    flags = ["--old_store", stores / "old_texts", "--new_store", stores / "new_texts"]
    ran = run("fit", *flags, "--output_dir", tmp_path / "out", "--json")
    assert ran.status == 0, ran.err
    assert ran.document == {
        "method": "procrustes", "items": 18, "new_dim": 24, "old_dim": 16, "compatible": None,
        "projection": str(tmp_path / "out" / "projection"), "decision": None,
    }  # fmt: skip
    assert ran.document == json.loads((tmp_path / "out" / "result.json").read_text())
    fitted = Projection.from_pretrained(ran.document["projection"])
    first, second = (EmbeddingStore.open(stores / f"{side}_texts") for side in ("new", "old"))
    assert_equal_maps(fitted, fit_projection(first.read(), second.read()))
    assert fitted.old_space.same_as(old.space)
    assert fitted.new_space.same_as(new.space)


def test_from_stores_of_images_with_a_method_and_its_options(run, stores, encoders, new, old, tmp_path):
    flags = ["--old_store", stores / "old_images", "--new_store", stores / "new_images"]
    flags += ["--method", "low_rank", "--options.rank", "5", "--output_dir", tmp_path / "out"]
    ran = run("fit", *flags, *encoders)
    assert ran.out == (
        "low_rank: 24 → 16 dimensions, fitted to 60 items\n"
        f"projection: {tmp_path / 'out' / 'projection'}\n"
        f"compatible encoder: {tmp_path / 'out' / 'compatible'}\n"
    )
    vectors = [EmbeddingStore.open(stores / f"{side}_images").read() for side in ("new", "old")]
    expected = fit_projection(*vectors, "low_rank", rank=5, new_space=new.space, old_space=old.space)
    upgraded = CompatibleEncoder.from_pretrained(tmp_path / "out" / "compatible")
    assert_equal_maps(upgraded.projection, expected)
    texts = SCENES.texts[:5]
    torch.testing.assert_close(
        upgraded.encode_texts(texts), expected(new.encode_texts(texts)), rtol=0, atol=1e-5
    )


def test_from_captions_and_the_seed_of_a_trained_method(run, encoders, captions, old, new, tmp_path):
    words = ["fit", *encoders, *captions, "--method", "mlp", "--options.steps", "3", "--seed", "4", "--json"]
    ran = run(*words, "--output_dir", tmp_path / "out")
    assert ran.status == 0, ran.err
    texts = list(dict.fromkeys(read_captions(CaptionSource("scenes", limit=80, seed=1))))
    assert ran.document["items"] == len(texts)
    vectors = new.encode_texts(texts), old.encode_texts(texts)
    expected = fit_projection(*vectors, "mlp", steps=3, seed=4)
    assert_equal_maps(Projection.from_pretrained(tmp_path / "out" / "projection"), expected)


def test_the_choice_has_the_defaults_of_choose_projection():
    config = FitConfig("out", new_store="new", old_store="old", method="auto")
    assert SelectionOptions.of(config.selection) == SelectionOptions()


def test_a_choice_by_pairs_can_be_repeated_and_evaluated(run, encoders, captions, pairs, specs, tmp_path):
    ran = run("fit", *encoders, *captions, *pairs, "--output_dir", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert ran.out.startswith("chose ")
    assert ran.out.endswith(f"compatible encoder: {tmp_path / 'out' / 'compatible'}\n")
    assert "checking images" in ran.err
    record = json.loads((tmp_path / "out" / "decision.json").read_text())
    again = run(
        "fit", *encoders, *captions, *pairs, "--overwrite", "true", "--output_dir", tmp_path / "out", "--json"
    )
    assert again.document["decision"] == {key: record[key] for key in again.document["decision"]}
    evaluation = ["--pairs.source", "scenes", "--pairs.split", "test", "--pairs.limit", "12"]
    upgraded = ["--upgraded.chosen", tmp_path / "out" / "compatible", "--output_dir", tmp_path / "evaluation"]
    measured = run("evaluate", *encoders, *evaluation, *upgraded, "--json")
    assert measured.status == 0, measured.err
    saved = json.loads((tmp_path / "evaluation" / "retrieval.json").read_text())
    assert measured.document == {key: saved[key] for key in measured.document}
    assert [cell["name"] for cell in measured.document["cells"]] == ["old/old", "new/old", "new/new"]


def test_a_choice_from_stores_leaves_the_pairs_captions_out(run, encoders, pairs, stores, old, new, tmp_path):
    """The stores have captions of the pairs, which are not fitted to; auto's own options work."""
    own = read_captions(CaptionSource("scenes", limit=24))[:1]
    for side, encoder in (("old", old), ("new", new)):
        store = EmbeddingStore.open(stores / f"{side}_texts")
        store.append(encoder.encode_texts(own), ["pair-0"], {"caption": own})
    flags = ["--old_store", stores / "old_texts", "--new_store", stores / "new_texts", *encoders, *pairs]
    ran = run("fit", *flags, "--options.ks", "[1, 2]", "--output_dir", tmp_path / "out", "--json")
    assert ran.status == 0, ran.err
    assert ran.document["method"] == "auto"
    assert ran.document["items"] == 18
    assert ran.document["decision"]["evidence"] == "pairs"
    assert set(ran.document["decision"]["directions"]["T2I"]["recall"]) == {"R@1", "R@2"}
    upgraded = CompatibleEncoder.from_pretrained(tmp_path / "out" / "compatible")
    assert upgraded.ensemble is not None


def test_the_projection_alone_is_evaluated_as_well(run, encoders, stores, specs, tmp_path):
    flags = ["--old_store", stores / "old_texts", "--new_store", stores / "new_texts"]
    fitted = run("fit", *flags, "--output_dir", tmp_path / "out", "--json").document["projection"]
    evaluation = ["--pairs.source", "scenes", "--pairs.split", "test", "--pairs.limit", "12"]
    ran = run("evaluate", *encoders, *evaluation, "--upgraded.x", fitted, "--output_dir", tmp_path / "e")
    assert ran.status == 0
    assert ran.out.startswith("query/gallery")
    from xbt.data import PairSource

    config = EvaluationConfig(*specs, PairSource("scenes", split="test", limit=12), str(tmp_path / "f"))
    config.upgraded = {"x": fitted}
    report = run_evaluation(config)
    written = json.loads((tmp_path / "e" / "retrieval.json").read_text())
    assert written["cells"] == json.loads(json.dumps(report.to_dict()["cells"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither was given"),
        (["--old_store", "x"], "--new_store is missing"),
        (["--captions.source", "scenes"], "give --old and --new as well"),
        (["--captions.source", "scenes", "--old_store", "x", "--new_store", "y"], "both were given"),
        (["STORES", "--pairs.source", "scenes"], "--pairs.source is embedded by both encoders"),
        (["STORES", "--method", "magic"], "--method 'magic' is not known; use one of auto, identity, "),
        (["STORES", "--options.noize", "1"], "no option 'noize'"),
        (["STORES", "--folds", "3"], "--folds is for --method auto"),
        (["STORES", "--method", "auto", "--folds", "1"], "folds is 1"),
        (["STORES", "--metod", "auto"], "metod"),
        (["--old_store", "OLD", "--new_store", "nowhere"], "nowhere"),
        (["--old_store", "IMAGES", "--new_store", "NEW"], "rows"),
    ],
)
def test_wrong_input_is_one_sentence(run, stores, tmp_path, words, message):
    names = {"OLD": "old_texts", "NEW": "new_texts", "IMAGES": "old_images"}
    both = ["--old_store", stores / "old_texts", "--new_store", stores / "new_texts"]
    line = [
        each
        for word in words
        for each in (both if word == "STORES" else [stores / names[word]] if word in names else [word])
    ]
    ran = run("fit", "--output_dir", tmp_path / "out", *line)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert not (tmp_path / "out" / "projection").exists()


def test_a_store_of_another_model_is_refused(run, stores, specs, tmp_path):
    flags = ["--old_store", stores / "old_texts", "--new_store", stores / "new_texts"]
    ran = run("fit", *flags, "--old", specs[1], "--output_dir", tmp_path / "out")
    assert ran.status == 2
    assert "--old_store" in ran.err
    assert specs[0] in ran.err
    assert specs[1] in ran.err


@pytest.mark.parametrize(
    ("pair_rows", "shuffled", "message"),
    [
        (slice(None), False, "every caption of the stores is one of the pairs' own"),
        (slice(5), True, "are not of the same items"),
    ],
)
def test_stores_that_have_captions_of_the_pairs(
    run, encoders, pairs, old, new, tmp_path, pair_rows, shuffled, message
):
    texts = read_captions(CaptionSource("scenes", limit=24))[pair_rows]
    texts += [] if pair_rows == slice(None) else TEXTS
    for side, encoder in (("old", old), ("new", new)):
        store = EmbeddingStore.create(tmp_path / side, modality="text", space=encoder.space)
        names = [f"text-{row}" for row in range(len(texts))]
        ids = names[::-1] if shuffled and side == "new" else names
        store.append(encoder.encode_texts(texts), ids, {"caption": texts})
    flags = ["--old_store", tmp_path / "old", "--new_store", tmp_path / "new", *encoders, *pairs]
    ran = run("fit", *flags, "--output_dir", tmp_path / "out")
    assert ran.status == 2
    assert message in ran.err


def test_captions_that_are_all_of_the_pairs(run, encoders, pairs, tmp_path):
    words = ["--captions.source", "scenes", "--captions.limit", "24", "--method", "ridge"]
    ran = run("fit", *encoders, *pairs, *words, "--output_dir", tmp_path / "out")
    assert ran.status == 2
    assert "every caption is one of the pairs' own" in ran.err


def test_a_folder_that_does_not_say_its_model(run, specs, stores, old, tmp_path):
    """clip-retrieval's folders do not; the encoder says it."""
    folder = tmp_path / "folder" / "text_emb"
    folder.mkdir(parents=True)
    np.save(folder / "text_emb_0.npy", EmbeddingStore.open(stores / "old_texts").read())
    new_vectors = EmbeddingStore.open(stores / "new_texts")
    store = EmbeddingStore.create(tmp_path / "new", modality="text", space=new_vectors.space)
    store.append(new_vectors.read(), [f"row-{row}" for row in range(18)])
    flags = ["fit", "--old_store", tmp_path / "folder", "--new_store", tmp_path / "new"]
    ran = run(*flags, "--output_dir", tmp_path / "out")
    assert ran.status == 2
    assert "give --old as well" in ran.err
    ran = run(*flags, "--old", specs[0], "--output_dir", tmp_path / "out", "--json")
    assert ran.status == 0, ran.err
    assert Projection.from_pretrained(ran.document["projection"]).old_space.same_as(old.space)


def test_stores_of_other_items_are_refused(run, stores, new, tmp_path):
    store = EmbeddingStore.create(tmp_path / "other", modality="text", space=new.space)
    store.append(np.eye(18, 24, dtype=np.float32), [f"other-{row}" for row in range(18)])
    flags = ["--old_store", stores / "old_texts", "--new_store", tmp_path / "other"]
    ran = run("fit", *flags, "--output_dir", tmp_path / "out")
    assert ran.status == 2
    assert "'other-0'" in ran.err


def test_a_directory_that_cannot_be_written_is_named_before_anything_is_opened(run):
    stores = ["--old_store", "nowhere", "--new_store", "nowhere"]
    texts = ["--old", "no", "--new", "no", "--captions.source", "no.txt", "--pairs.source", "no.json"]
    for words in (stores, texts):
        ran = run("fit", *words, "--output_dir", "/proc/nope")
        assert (ran.status, ran.out) == (2, "")
        assert ran.err.startswith("xbt fit: error: --output_dir /proc/nope cannot be written: ")
