"""Bad input to the recipes: one clear sentence, a non-zero exit, no traceback."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from xbt.encoders import load_encoder
from xbt.projections import fit_projection

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a recipe as a script in this process; return its exit status and the last line on stderr."""

    def call(name: str, *flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        output = capsys.readouterr().err
        assert "Traceback" not in output
        lines = [line for line in output.replace("\r", "\n").splitlines() if "error:" in line]
        assert len(lines) == 1, output
        return caught.value.code, lines[0]

    return call


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny.tiny_open_clip(root / "old", seed=0), tiny.tiny_open_clip(root / "new", seed=1)


@pytest.fixture
def stage1(specs, tmp_path):
    return [
        "--old", specs[0], "--new", specs[1], "--captions.source", "scenes", "--captions.limit", "60",
        "--output_dir", str(tmp_path / "out"), "--training.batch_size", "16", "--training.steps", "2",
    ]  # fmt: skip


@pytest.fixture
def stage2(specs, tmp_path):
    old, new = (load_encoder(spec) for spec in specs)
    texts = [f"a {n} circle" for n in range(40)]
    projection = fit_projection(
        new.encode_texts(texts), old.encode_texts(texts), new_space=new.space, old_space=old.space
    )
    projection.save_pretrained(tmp_path / "projection")
    return [
        "--new", specs[1], "--projection", str(tmp_path / "projection"), "--pairs.source", "scenes",
        "--pairs.limit", "40", "--output_dir", str(tmp_path / "out"), "--training.batch_size", "16",
        "--training.steps", "2",
    ]  # fmt: skip


def test_missing_caption_file(run, stage1):
    code, line = run("pretrain_text_projection", *stage1, "--captions.source", "nowhere.txt")
    assert code == 2
    assert "nowhere.txt" in line


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--noize", "--noize"),
        ("--training.stepz", "--training.stepz"),
        ("--captions.collumn", "\"captions\": Option 'collumn' is not accepted"),
    ],
)
def test_unknown_key(run, stage1, flag, words):
    code, line = run("pretrain_text_projection", *stage1, flag, "1")
    assert code == 2
    assert words in line


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ("\n  \n\t\n", "only spaces")])
def test_empty_and_blank_corpus(run, stage1, tmp_path, text, words):
    file = tmp_path / "captions.txt"
    file.write_text(text)
    code, line = run("pretrain_text_projection", *stage1, "--captions.source", str(file))
    assert code == 2
    assert words in line
    assert "captions.txt" in line


def test_missing_model(run, stage1):
    code, line = run("pretrain_text_projection", *stage1, "--old", "open_clip:local-dir:/no/model")
    assert code == 2
    assert "/no/model" in line


def test_a_model_that_is_not_a_clip(run, stage1, tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "bert")
    code, line = run("pretrain_text_projection", *stage1, "--old", f"transformers:{tmp_path / 'bert'}")
    assert code == 2
    assert "'bert'" in line
    assert "not a CLIP" in line


def test_nan_in_a_model(run, stage1, tmp_path):
    spec = tiny.tiny_open_clip(tmp_path / "broken", seed=3)
    weights = tmp_path / "broken" / "open_clip_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "text_projection": tensors["text_projection"] * float("nan")}, weights)
    code, line = run("pretrain_text_projection", *stage1, "--new", spec)
    assert code == 2
    assert "NaN" in line
    assert "broken" in line


def test_lora_targets_that_match_nothing(run, stage2):
    code, line = run("finetune_lora", *stage2, "--lora.target_modules", "no_such_layer")
    assert code == 2
    assert "no_such_layer" in line
    assert "matches no module" in line


def test_lora_rank_zero(run, stage2):
    code, line = run("finetune_lora", *stage2, "--lora.rank", "0")
    assert code == 2
    assert "lora.rank" in line


def test_only_corrupt_images(run, stage2, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    record = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog", "tokens": ["a", "dog"]}]}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [record], "dataset": "toy"}))
    code, line = run(
        "finetune_lora", *stage2, "--pairs.source", str(tmp_path / "dataset.json"), "--pairs.limit", "1"
    )
    assert code == 2
    assert "none of the 1 images" in line
    assert "a.jpg" in line


def test_projection_of_another_model(run, stage2, tmp_path):
    other = tiny.tiny_open_clip(tmp_path / "other", seed=9)
    code, line = run("finetune_lora", *stage2, "--new", other)
    assert code == 2
    assert "other" in line
    assert "new" in line


def test_truncated_projection(run, stage2, tmp_path):
    file = tmp_path / "projection" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    code, line = run("finetune_lora", *stage2)
    assert code == 2
    assert "model.safetensors is damaged" in line


def test_output_directory_that_is_a_file(run, stage1, tmp_path):
    (tmp_path / "file").write_text("")
    code, line = run("pretrain_text_projection", *stage1, "--output_dir", str(tmp_path / "file"))
    assert code == 2
    assert "is a file" in line


def test_another_run_in_the_output_directory(run, stage1, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("hidden_dim: 7\n")
    code, line = run("pretrain_text_projection", *stage1)
    assert code == 2
    assert "holds a run with other settings" in line


def test_evaluation_without_the_upgraded_encoder(run, specs, tmp_path):
    flags = ["--old", specs[0], "--new", specs[1], "--pairs.source", "scenes", "--pairs.limit", "10"]
    code, line = run(
        "evaluate_retrieval",
        *flags,
        "--output_dir",
        str(tmp_path / "e"),
        "--upgraded.x",
        str(tmp_path / "no"),
    )
    assert code == 2
    assert str(tmp_path / "no") in line


def test_evaluation_in_two_processes_is_refused(run, specs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--old", specs[0], "--new", specs[1], "--pairs.source", "scenes", "--output_dir", str(tmp_path)]
    code, line = run("evaluate_retrieval", *flags)
    assert code == 2
    assert "--num_processes 1" in line
