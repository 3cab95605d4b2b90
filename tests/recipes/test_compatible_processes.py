"""Backbones trained by two real processes, and by processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import labelled
import pytest
import torch
from safetensors.torch import load_file

from xbt.backbones import CompatibleBackbone
from xbt.config import parse_config
from xbt.data import load_labelled
from xbt.evaluation import evaluate_labels
from xbt.training import CompatibleBackboneConfig, train_compatible_backbone

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip

pytestmark = pytest.mark.slow


def launch(arguments, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", list(labelled.SETS))
def test_the_papers_configs_run_in_two_processes(tmp_path, monkeypatch, name):
    """What is reported is true of the model that is saved, though each process had its own statistics."""
    monkeypatch.setitem(ENVIRONMENT, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    write, _, _ = labelled.SETS[name]
    write(tmp_path / "data")
    for role in ("old", "independent"):
        train_here(labelled.paper(name, role, tmp_path / "data", tmp_path))
    test = load_labelled(parse(labelled.paper(name, "old", tmp_path / "data", tmp_path)).test)
    for role in ("bct", "bt2", "oca"):
        launch(labelled.paper(name, role, tmp_path / "data", tmp_path), 2)
        result = json.loads((tmp_path / role / "result.json").read_text())
        assert result["processes"] == 2
        model = CompatibleBackbone.from_pretrained(tmp_path / role / "model")
        found = evaluate_labels(model.encode_images(test.images), test.labels)
        assert result["evaluation"]["cells"]["new/new"]["mAP"] == pytest.approx(
            found.mean_average_precision, abs=1e-4
        )


def parse(arguments):
    return parse_config(CompatibleBackboneConfig, list(map(str, arguments[1:])))


def train_here(arguments):
    train_compatible_backbone(parse(arguments))


def folders(tmp_path, out, method, *flags):
    return [
        "recipes/train_compatible_backbone.py", "--config", "recipes/configs/compatible_folder_oca.yaml",
        "--method", method, "--data.source", tmp_path / "data", "--test.source", tmp_path / "data",
        "--output_dir", out, "--training.batch_size", "16", "--training.warmup_epochs", "0",
        "--training.checkpoint_every", "4", *flags,
    ]  # fmt: skip


def old_model(tmp_path, *flags):
    labelled.write_folders(tmp_path / "data", classes=4, train=16)
    alone = ["--old", "null", "--extra_dims", "null", "--new_dim", "16", "--training.epochs", "2", *flags]
    for name in ("old", "new"):
        train_here(folders(tmp_path, tmp_path / name, "independent", *alone))


@pytest.mark.parametrize("method", ["bt2", "oca"])
def test_one_and_two_processes_agree_without_batch_norm(tmp_path, monkeypatch, method):
    """Batch norm sees each process's own part of a batch on a CPU; a network without it must not differ.

    Adam would make rounding errors large where a gradient is zero, as that of a bias of attention's keys.
    """
    monkeypatch.chdir(ROOT)
    small = ["--backbone", "timm:test_vit", "--training.optimizer", "sgd", "--training.lr", "0.05"]
    old_model(tmp_path, *small)
    flags = [*small, "--old", tmp_path / "old/model", "--independent", tmp_path / "new/model"]
    flags += ["--new_dim", "16", "--extra_dims", "4", "--training.epochs", "2"]
    for processes in (1, 2):
        launch(folders(tmp_path, tmp_path / f"run{processes}", method, *flags), processes)
    early, one, two = (
        load_file(tmp_path / name / "trainable.safetensors")
        for name in ("run1/checkpoints/step_00000004", "run1/checkpoints/step_00000008",
                     "run2/checkpoints/step_00000008")
    )  # fmt: skip
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= 1e-4, name
    moved = (early["backbone.embedding.weight"] - one["backbone.embedding.weight"]).abs().max()
    assert moved > 1e-3  # the runs that agree have trained
    results = [json.loads((tmp_path / f"run{n}/result.json").read_text()) for n in (1, 2)]
    assert [result["processes"] for result in results] == [1, 2]


def test_killed_and_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    old_model(tmp_path)
    flags = ["--old", tmp_path / "old/model", "--extra_dims", "4", "--training.epochs", "20"]
    launch(folders(tmp_path, tmp_path / "whole", "oca", *flags), 1)
    arguments = list(map(str, folders(tmp_path, tmp_path / "killed", "oca", *flags)))
    running = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoints/step_00000012").is_dir():
        assert running.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed/model").exists()
    assert "continues from step" in launch(arguments, 1)
    one, two = (load_file(tmp_path / f"{name}/model/model.safetensors") for name in ("whole", "killed"))
    assert any("running_mean" in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1]
