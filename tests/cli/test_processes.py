"""Real processes: ``accelerate launch -m xbt`` as the recipes are launched, and one that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from xbt.data import make_scenes
from xbt.store import EmbeddingStore

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
          str(ROOT / "recipes/configs/accelerate/cpu_two_processes.yaml")]  # fmt: skip

pytestmark = pytest.mark.slow


def flags(spec, out, limit):
    return ["embed", "--encoder", spec, "--images.source", "scenes", "--images.limit", str(limit),
            "--output_dir", str(out), "--shard_size", "10", "--num_workers", "0", "--batch_size", "4",
            "--json"]  # fmt: skip


def test_two_processes_share_the_work_and_one_speaks(specs, old, tmp_path):
    command = [*LAUNCH, "-m", "xbt", *flags(specs[0], tmp_path / "store", 40)]
    ran = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["items"] == 40
    assert ran.stderr.count("embedded 40 images") == 1
    store = EmbeddingStore.open(tmp_path / "store")
    assert np.abs(store.read() - old.encode_images(make_scenes(40).images).numpy()).max() <= 1e-3  # fp16


def test_an_error_in_two_processes_is_printed_once(specs, tmp_path):
    command = [*LAUNCH, "-m", "xbt", *flags(specs[0], tmp_path / "store", 40), "--images.source", "nowhere"]
    ran = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ran.returncode != 0
    assert ran.stderr.count("xbt embed: error:") == 1
    assert "nowhere" in json.loads(ran.stdout)["error"]["message"]


def listen_to_the_keyboard():
    """What a shell starts in the background ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_of_a_real_job(specs, tmp_path):
    command = [sys.executable, "-m", "xbt", *flags(specs[0], tmp_path / "store", 20_000)]
    running = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=listen_to_the_keyboard,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "store").rglob("*.npy"))) < 2:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "xbt embed: interrupted; the same command continues where it was" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["error"]["kind"] == "KeyboardInterrupt"
