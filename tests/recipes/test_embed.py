"""The embedding recipe as a user calls it: its command line, its errors, torchrun, and a kill."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny
from pictures import SCENES

from xbt.encoders import load_encoder
from xbt.store import EmbeddingStore

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny.tiny_open_clip(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the recipe in this process; return its exit status, what it printed and the error's line."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["embed.py", *flags])
        status = 0
        try:
            runpy.run_path(str(ROOT / "recipes/embed.py"), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        errors = [line for line in output.err.replace("\r", "\n").splitlines() if "error:" in line]
        assert len(errors) == (status != 0), output.err
        return status, output.out, "".join(errors)

    return call


def test_scenes_and_captions(run, spec, tmp_path):
    common = ["--encoder", spec, "--shard_size", "20", "--batch_size", "8"]
    status, output, _ = run(
        *common, "--output_dir", str(tmp_path / "a"), "--images.source", "scenes", "--images.limit", "30"
    )
    assert (status, output.count("embedded 30 images in")) == (0, 1)
    assert EmbeddingStore.open(tmp_path / "a").ids[29] == "scene-train-0-000029"
    status, output, _ = run(
        *common, "--output_dir", str(tmp_path / "b"), "--captions.source", "scenes", "--captions.limit", "30"
    )
    assert (status, output.count("embedded 30 texts in")) == (0, 1)
    assert EmbeddingStore.open(tmp_path / "b").ids[29] == "scene-train-0-000029#0"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give either --images.source or --captions.source: neither was given"),
        (
            ["--images.source", "scenes", "--captions.source", "scenes"],
            "give either --images.source or --captions.source: both were given",
        ),
        (["--images.source", "nowhere"], "nowhere does not exist"),
        (["--images.source", "nowhere/*.tar"], "nowhere/*.tar: there is no such tar file"),
        (["--images.source", "hf:./nowhere"], "nowhere does not exist"),
        (["--captions.source", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--images.source", ""], "source is empty"),
        (["--images.sourc", "scenes"], "Key \"images\": Option 'sourc' is not accepted (command line)"),
        (["--images.source", "scenes", "--images.limit", "few"], "few"),
        (["--images.source", "scenes", "--images.streaming", "true"], "streaming True was given with scenes"),
        (["--images.source", "scenes", "--dtype", "float64"], "float64"),
        (["--images.source", "scenes", "--shard_size", "0"], "--shard_size must be at least 1, got 0"),
        (["--images.source", "scenes", "--output_dir", "/dev/null/x"], "/dev/null/x cannot be written"),
        (["--images.source", "scenes", "--encoder", "open_clip:nothing/x"], "nothing"),
    ],
)
def test_wrong_input_is_one_sentence(run, spec, tmp_path, flags, words):
    status, _, error = run("--encoder", spec, "--output_dir", str(tmp_path / "out"), *flags)
    assert status == 2
    assert words in error
    assert not list(tmp_path.rglob("config.yaml"))


def torchrun(processes, flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), "recipes/embed.py", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture
def job(spec, tmp_path):
    """The flags of a job of 1,500 images, its directory and its images."""
    for number in range(1500):
        path = tmp_path / f"photos/{number:04d}.png"
        if number < 64:
            path.parent.mkdir(exist_ok=True)
            SCENES.image(number).save(path)
        else:
            path.hardlink_to(tmp_path / f"photos/{number % 64:04d}.png")
    flags = [
        "--encoder", spec, "--images.source", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "out"),
        "--shard_size", "20", "--batch_size", "1", "--dtype", "float32",
    ]  # fmt: skip
    return flags, tmp_path / "out", sorted((tmp_path / "photos").iterdir())


@pytest.mark.slow
def test_killed_under_torchrun_and_continued_with_more_processes(spec, job):
    flags, out, photos = job
    running = torchrun(1, flags)
    deadline = time.monotonic() + 120
    while len(list(out.glob("in_progress/[0-9]*.json"))) < 10:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in [running, *psutil.Process(running.pid).children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    running.communicate()
    committed = len(list(out.glob("in_progress/[0-9]*.json")))
    assert 10 <= committed < 75
    again = torchrun(2, flags)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert f"{20 * committed} in earlier runs" in output
    store = EmbeddingStore.open(out)
    store.verify()
    assert store.ids == [path.name for path in photos]
    assert np.abs(store.read() - load_encoder(spec).encode_images(photos).numpy()).max() <= 1e-6


def listen_to_the_keyboard():
    """What a shell starts in the background ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_interrupted_from_the_keyboard(job):
    flags, out, _ = job
    running = subprocess.Popen(
        [sys.executable, "recipes/embed.py", *flags], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=listen_to_the_keyboard,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(out.glob("in_progress/[0-9]*.json"))) < 3:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; the same command continues" in output
    assert "Traceback" not in output
