"""The choice from files on tiny models: what it writes can be loaded and searches as it was judged."""

from __future__ import annotations

import json
import weakref

import pytest
import tiny
import torch

from xbt.cli.fit import FitConfig, embed_pairs, run_fit
from xbt.compatible import CompatibleEncoder
from xbt.data import CaptionSource, PairSource, make_scenes
from xbt.encoders import load_encoder
from xbt.errors import ConfigError
from xbt.evaluation.job import EvaluationConfig, run_evaluation

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("choice")
    return tiny.tiny_open_clip(root / "old", seed=0), tiny.tiny_open_clip(root / "new", seed=1)


def config(specs, tmp_path, **changes):
    values = {
        "captions": CaptionSource("scenes", limit=80, seed=1),
        "pairs": PairSource("scenes", limit=24),
        "output_dir": str(tmp_path / "out"),
        **changes,
    }
    return FitConfig(old=specs[0], new=specs[1], **values)


def test_what_is_saved_makes_the_decision_s_queries(specs, tmp_path):
    decision = run_fit(config(specs, tmp_path)).decision
    out = tmp_path / "out"
    record = json.loads((out / "decision.json").read_text())
    assert record["evidence"] == "pairs"
    assert record["n_images"] == 24
    assert (out / "decision.txt").read_text().startswith("chose ")
    assert {"config.yaml", "versions.json"} <= {path.name for path in out.iterdir()}
    old, new = (load_encoder(spec) for spec in specs)
    upgraded = CompatibleEncoder.from_pretrained(out / "compatible")
    texts = make_scenes(5, seed=9).texts
    expected = decision.queries(new.encode_texts(texts), old.encode_texts(texts), "T2I")
    torch.testing.assert_close(upgraded.encode_texts(texts), expected, rtol=0, atol=1e-5)
    # Random models have nothing to gain, so that the old query is what remains.
    assert not decision.deployed("T2I")
    torch.testing.assert_close(expected, old.encode_texts(texts), rtol=0, atol=1e-5)


def test_images_of_the_pairs_are_not_all_decoded_at_once(specs, monkeypatch):
    pairs, alive, most = make_scenes(200), weakref.WeakValueDictionary(), []
    decode = pairs.image

    def image(row):
        alive[len(most)] = decoded = decode(row).copy()
        most.append(len(alive))
        return decoded

    monkeypatch.setattr(pairs, "image", image)
    new, old = (load_encoder(spec) for spec in specs)
    vectors = embed_pairs(pairs, new, old)
    torch.testing.assert_close(vectors.new_images, new.encode_images(pairs.images), atol=1e-6, rtol=0)
    assert len(most) == 400  # once for each model
    assert max(most) < 150


def test_the_evaluation_takes_it(specs, tmp_path):
    run_fit(config(specs, tmp_path))
    report = run_evaluation(
        EvaluationConfig(
            *specs,
            PairSource("scenes", split="test", limit=12),
            str(tmp_path / "evaluation"),
            {"choice": str(tmp_path / "out/compatible")},
        )
    )
    assert report.cell("new/old").t2i == report.cell("old/old").t2i
    assert report.differences["new/old"]["T2I"][1].fixed == 0


def test_which_ks_count_is_a_setting(specs, tmp_path):
    decision = run_fit(config(specs, tmp_path, ks=[1, 3], every_k=True)).decision
    assert set(decision.gain_tests["T2I"].differences) == {1, 3}
    assert "k = 1, 3" in decision.gain_tests["T2I"].why


def test_captions_of_the_pairs_do_not_count_as_corpus(specs, tmp_path):
    pairs = PairSource("scenes", limit=24)
    same = tmp_path / "captions.txt"
    same.write_text("\n".join(make_scenes(24).texts), encoding="utf-8")
    with pytest.raises(ConfigError, match="every caption is one of the pairs' own"):
        run_fit(config(specs, tmp_path, captions=CaptionSource(str(same)), pairs=pairs))


def test_several_processes_are_refused(specs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        run_fit(config(specs, tmp_path))
