"""``xbt embed``: the store, what is result of it, and what is printed on the way."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from xbt.data import make_scenes
from xbt.store import EmbeddingStore


@pytest.fixture
def flags(specs, tmp_path):
    return ["embed", "--encoder", specs[0], "--images.source", "scenes", "--images.limit", "20",
            "--images.split", "test", "--output_dir", tmp_path / "store", "--num_workers", "0",
            "--dtype", "float32"]  # fmt: skip


def test_a_store_and_what_is_said_of_it(run, flags, old, specs, tmp_path):
    result = run(*flags)
    assert result.status == 0
    assert result.out == f"{tmp_path / 'store'}: 20 image vectors of {old.space}\n"
    assert "embedded 20 images in" in result.err
    store = EmbeddingStore.open(tmp_path / "store")
    expected = old.encode_images(make_scenes(20, 0, "test").images)
    assert np.abs(store.read() - expected.numpy()).max() <= 1e-6


def test_json_is_the_store_s_description(run, flags, specs, tmp_path):
    result = run(*flags, "--json")
    store = EmbeddingStore.open(tmp_path / "store")
    expected = {
        "store": str(store.path), "items": 20, "modality": "image", "dtype": "float32", "dim": 16,
        "model": specs[0], "revision": None, "columns": store.columns, "rejected": 0, "notes": 0,
    }  # fmt: skip
    assert {**result.document, "bytes": 0} == {**expected, "bytes": 0}
    assert result.document["bytes"] > 20 * 16 * 4
    again = run(*flags, "--json")
    assert "is finished already" in again.err
    assert again.document == result.document


def test_a_config_file_as_the_recipe_has_it(run, flags, specs, tmp_path):
    keys = {"encoder": specs[0], "images": {"source": "scenes", "limit": 20}, "num_workers": 0}
    (tmp_path / "embed.yaml").write_text(yaml.safe_dump(keys))
    result = run("embed", "--config", tmp_path / "embed.yaml", "--output_dir", tmp_path / "s", "--json")
    assert result.document["items"] == 20


def test_rejected_images_are_counted(run, specs, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    make_scenes(1).image(0).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    words = ["embed", "--encoder", specs[0], "--images.source", folder, "--output_dir", tmp_path / "s"]
    result = run(*words, "--num_workers", "0")
    assert "1 image vectors" in result.out
    assert "1 rejected, see rejected.jsonl" in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images.sorce", "x"], "sorce"),
        (["--captions.source", "x.txt"], "both were given"),
        (["--encoder", "open_clip:local-dir:/no/model"], "/no/model"),
        (["--encoder", "vit"], "is not an encoder specification"),
    ],
)
def test_wrong_input_is_one_sentence(run, flags, words, message):
    result = run(*flags, *words, "--json")
    assert result.status == 2
    assert message in result.document["error"]["message"]
    assert [line for line in result.err.splitlines() if "error:" in line] == result.err.splitlines()[-1:]
