"""Stage 1 with every loss and noise: the same from one process as from two, which torchrun really starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["uniform", "centred"])
def test_relational_loss_and_noise_agree_between_one_and_two_processes(tmp_path, family):
    old = tiny.tiny_open_clip(tmp_path / "old", seed=0, context_length=77)
    new = tiny.tiny_transformers_clip(tmp_path / "new", seed=2, context_length=77)
    found = []
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "recipes/pretrain_text_projection.py", "--old", old, "--new", new, "--captions.source", "scenes",
            "--captions.limit", "300", "--output_dir", str(out), "--training.steps", "15",
            "--training.batch_size", "64", "--training.eval_every", "15", "--training.checkpoint_every", "15",
            "--training.lr", "0.003", "--held_out", "60", "--noise_family", family,
            "--relational_weight", "100",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(load_file(out / "checkpoints/step_00000015/trainable.safetensors"))
    assert abs(found[0]["projection.scale"]) > 0
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).abs().max() <= 1e-4, name
