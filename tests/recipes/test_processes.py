"""Two real processes, and processes that are killed: the recipes as a user launches them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from xbt.data import read_captions
from xbt.encoders import load_encoder
from xbt.projections import fit_projection

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    old = tiny.tiny_open_clip(root / "old", seed=0, context_length=77)
    new = tiny.tiny_open_clip(root / "new", seed=1, context_length=77)
    hf = tiny.tiny_transformers_clip(root / "hf", seed=2, context_length=77)
    texts = read_captions("scenes")[:200]
    for name, spec in (("new", new), ("hf", hf)):
        a, b = load_encoder(spec), load_encoder(old)
        projection = fit_projection(
            a.encode_texts(texts), b.encode_texts(texts), new_space=a.space, old_space=b.space
        )
        projection.save_pretrained(root / f"projection_{name}")
    return {"old": old, "new": new, "hf": hf, "root": root}


def stage1(models, out, steps=30):
    return [
        "recipes/pretrain_text_projection.py", "--old", models["old"], "--new", models["hf"],
        "--captions.source", "scenes", "--captions.limit", "400", "--output_dir", str(out),
        "--training.steps", str(steps), "--training.batch_size", "64", "--training.eval_every", "10",
        "--training.checkpoint_every", "10", "--training.lr", "0.003", "--held_out", "60",
    ]  # fmt: skip


def stage2(models, name, out, steps=6):
    return [
        "recipes/finetune_lora.py", "--new", models[name],
        "--projection", str(models["root"] / f"projection_{name}"), "--pairs.source", "scenes",
        "--pairs.limit", "60", "--output_dir", str(out), "--training.steps", str(steps),
        "--training.batch_size", "16", "--training.eval_every", "2", "--training.checkpoint_every", "2",
    ]  # fmt: skip


def launch(arguments, processes=1):
    """Run a recipe with torchrun, which starts real processes, and return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_same(first: Path, second: Path, tolerance: float) -> None:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= tolerance, name


def test_stage1_agrees_between_one_and_two_processes(models, tmp_path):
    launch(stage1(models, tmp_path / "one"), 1)
    launch(stage1(models, tmp_path / "two"), 2)
    assert_same(*(tmp_path / run / "projection/model.safetensors" for run in ("one", "two")), 1e-4)
    last = [tmp_path / run / "checkpoints/step_00000030/trainable.safetensors" for run in ("one", "two")]
    assert_same(*last, 1e-4)
    assert abs(load_file(last[0])["projection.scale"]) > 0  # the runs that agree have trained
    world = json.loads((tmp_path / "two/result.json").read_text())["processes"]
    assert world == 2


@pytest.mark.parametrize("name", ["new", "hf"])
def test_stage2_agrees_between_one_and_two_processes(models, tmp_path, name):
    launch(stage2(models, name, tmp_path / "one"), 1)
    launch(stage2(models, name, tmp_path / "two"), 2)
    last = [tmp_path / run / "checkpoints/step_00000006/trainable.safetensors" for run in ("one", "two")]
    assert_same(*last, 1e-4)
    assert any(t.abs().max() > 0 for key, t in load_file(last[0]).items() if "lora_B" in key)
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    assert results[0]["best_step"] == results[1]["best_step"]


def test_a_batch_that_cannot_be_split_is_refused(models, tmp_path):
    arguments = [*stage1(models, tmp_path / "out"), "--training.batch_size", "63"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "batch_size 63 cannot be split over 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_stage1_killed_and_continued(models, tmp_path):
    launch(stage1(models, tmp_path / "whole", steps=300))
    arguments = stage1(models, tmp_path / "killed", steps=300)
    running = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoints/step_00000020").is_dir():
        assert running.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed/projection").exists()
    output = launch(arguments)
    assert "continues from step" in output
    assert_same(*(tmp_path / run / "projection/model.safetensors" for run in ("whole", "killed")), 1e-6)
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "killed")]
    assert results[0]["history"] == results[1]["history"]


def test_accelerate_launch(models, tmp_path):
    flags = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    arguments = [*stage1(models, tmp_path / "out", steps=5), "--training.log_with", "tensorboard"]
    subprocess.run([*command, *arguments], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert (tmp_path / "out/projection/model.safetensors").is_file()
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
