"""The encoding benchmarks at a tiny size: what they compare is the same, and what they write is complete."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from PIL import Image

from xbt.space import PROBE_TEXTS

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a benchmark as a script; return its results and what it printed."""
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "tiny-arch", tiny.open_clip_config(context_length=77)
    )

    def call(name: str, *flags: str):
        target = tmp_path / "results" / "r"
        argv = [f"{name}.py", "--model", "tiny-arch", "--results", str(target), "--threads", "1", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        (written,) = target.parent.glob("*.json")
        printed = capsys.readouterr().out
        assert printed == written.with_suffix(".md").read_text()
        return json.loads(written.read_text()), printed

    return call


def test_text_encoding(run, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(PROBE_TEXTS) + "\n")
    result, printed = run(
        "text_encoding", "--captions", str(captions), "--texts", "12", "--batch_size", "4", "--rounds", "2"
    )
    assert [row["compared with"] for row in result["rows"]] == [
        "open_clip, full context",
        "transformers, full context",
        "transformers, longest of the batch",
    ]
    for row in result["rows"]:
        assert row["difference"] <= 1e-5
        rounds = row["times as fast"]["rounds"]
        assert rounds == [
            a / b for a, b in zip(row["seconds"]["rounds"], row["xbt's seconds"]["rounds"], strict=True)
        ]
    assert set(result["seconds"]["open_clip"]) == {"full context", "xbt", "tokenising"}
    assert result["config"]["captions"] == "captions.txt"
    assert str(tmp_path) not in json.dumps(result["rows"]) + printed
    assert "12 captions" in printed
    assert result["machine"]["matmul_tflops"] > 0


def test_text_encoding_in_half_precision(run, monkeypatch):
    dtypes = set()
    monkeypatch.setattr(
        torch.nn.functional,
        "layer_norm",
        lambda *args, known=torch.nn.functional.layer_norm, **options: (
            dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None),
            known(*args, **options),
        )[1],
    )
    result, printed = run("text_encoding", "--texts", "6", "--rounds", "1", "--precision", "bf16")
    assert "in bf16 on cpu" in printed
    assert torch.bfloat16 in dtypes  # beside the full precision of the encoders' own probes
    assert all(row["difference"] < 0.02 for row in result["rows"])


def test_both_libraries_read_the_same_tokens(tmp_path):
    module = runpy.run_path(str(BENCHMARKS / "text_encoding.py"))
    simple = open_clip.get_tokenizer("ViT-B-32")
    encoder = module["transformers_encoder"]("ViT-B-32")
    ours, theirs = encoder.tokenize(list(PROBE_TEXTS)), simple(list(PROBE_TEXTS))
    end = theirs.argmax(dim=1, keepdim=True)
    assert torch.equal(ours, theirs.where(torch.arange(77) <= end, simple.eot_token_id))


@pytest.mark.parametrize("own", [False, True])
def test_image_encoding(run, tmp_path, own):
    flags = []
    if own:
        for number in range(5):
            Image.new("RGB", (60, 50), (number * 40, 90, 10)).save(tmp_path / f"{number}.png")
        flags = ["--images", str(tmp_path)]
    result, printed = run(
        "image_encoding", "--count", "6", "--width", "80", "--height", "60", "--batch_size", "4",
        "--num_workers", "1", "--plain_workers", "1", "--rounds", "2", *flags,
    )  # fmt: skip
    assert [row["way"] for row in result["rows"]] == ["model alone", "xbt", "plain pipeline"]
    assert result["rows"][0]["rate over the model alone"]["rounds"] == [1, 1]
    assert result["rows"][2]["rate over the plain pipeline"]["rounds"] == [1, 1]
    assert result["difference"] < 1e-3  # the plain pipeline keeps fp16
    assert result["machine"]["matmul_tflops"] > 0
    assert result["machine"]["copy_gb_per_s"] > 0
    assert len(result["probe"]["rounds"]) == 2
    assert f"{5 if own else 6} image files" in printed
    assert str(tmp_path) not in printed


def test_a_directory_without_images_is_an_error(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        run("image_encoding", "--images", str(tmp_path / "empty"))
    assert caught.value.code == 2
