"""The backfilling recipe as a user calls it: command line, errors, torchrun, a kill, and the picture."""

from __future__ import annotations

import json
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
from backfills import COUNT, SCENES, lines, order_of
from PIL import Image

from xbt.encoders import load_encoder
from xbt.index import Gallery

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return (
        tiny.tiny_open_clip(folder / "old", context_length=77),
        tiny.tiny_open_clip(folder / "new", seed=1, dim=24, context_length=77),
    )


def make_gallery(path, spec, images, names):
    encoder = load_encoder(spec)
    made = Gallery.create(path, space=encoder.space, dtype="float32")
    made.add(encoder.encode_images(images), names)
    made.close()


@pytest.fixture
def flags(models, tmp_path):
    """The flags of a job of 60 scenes."""
    make_gallery(tmp_path / "gallery", models[0], [SCENES.image(row) for row in range(COUNT)], SCENES.ids)
    scenes = {"source": "scenes", "split": "test", "limit": COUNT, "seed": 5}
    options = {
        "gallery": tmp_path / "gallery", "encoder": models[1], "old": models[0],
        "output_dir": tmp_path / "out",
        "commit_every": 10, "evaluate_every": 20, "batch_size": 4, "num_workers": 0,
        **{f"images.{name}": value for name, value in scenes.items()},
        **{f"evaluation.{name}": value for name, value in scenes.items()},
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the recipe in this process; return its exit status, what it printed and the error's line."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["backfill.py", *words])
        status = 0
        try:
            runpy.run_path(str(ROOT / "recipes/backfill.py"), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        errors = [line for line in output.err.replace("\r", "\n").splitlines() if "error:" in line]
        return status, output.out, "".join(errors)

    return call


def test_a_whole_job(run, flags, tmp_path):
    status, output, _ = run(*flags)
    assert status == 0
    assert "backfilled 60 items; 60 of the order's 60 are taken up and 0 rejected; 100.0 %" in output
    assert "mean of R@1, R@5 and R@10: " in output
    out = tmp_path / "out"
    assert [point["position"] for point in lines(out / "curve.jsonl")] == [0, 20, 40, 60]
    assert json.loads((out / "result.json").read_text())["why"] == "nothing is left to do"
    assert {"config.yaml", "versions.json", "order.json"} <= {path.name for path in out.iterdir()}
    with Image.open(out / "curve.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--order", "best"], "best"),
        (["--recall_target", "60"], "--recall_target is a fraction such as 0.6, got 60.0"),
        (["--gallery", "nowhere"], "nowhere holds no gallery"),
        (["--images.source", "nowhere.json", "--images.seed", "0"], "nowhere.json does not exist"),
        (["--encoder", "open_clip:nothing/x"], "nothing"),
        (["--nothing", "1"], "nothing"),
    ],
)
def test_wrong_input_is_one_sentence(run, flags, tmp_path, words, message):
    status, _, error = run(*flags, *words)
    assert (status, error.count("error:")) == (2, 1)
    assert message in error
    assert not (tmp_path / "out" / "order.json").exists()
    assert len(Gallery.open(tmp_path / "gallery").parts) == 1


def torchrun(processes, flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), "recipes/backfill.py", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_killed_under_torchrun_and_continued_with_more_processes(models, flags, tmp_path):
    (tmp_path / "photos").mkdir()
    names = [f"{number:04d}.png" for number in range(900)]
    for number, name in enumerate(names):
        if number < COUNT:
            SCENES.image(number).save(tmp_path / "photos" / name)
        else:
            (tmp_path / "photos" / name).hardlink_to(tmp_path / "photos" / names[number % COUNT])
    photos = [tmp_path / "photos" / name for name in names]
    make_gallery(tmp_path / "photo_gallery", models[0], photos, names)
    (tmp_path / "photos" / names[123]).unlink()
    (tmp_path / "photos" / names[123]).write_bytes(b"no image")
    job = [
        "--gallery", str(tmp_path / "photo_gallery"), "--encoder", models[1], "--images.source",
        str(tmp_path / "photos"), "--output_dir", str(tmp_path / "out"), "--commit_every", "20",
        "--evaluate_every", "300", "--batch_size", "1", "--order", "random",
    ]  # fmt: skip
    running = torchrun(2, job)
    deadline = time.monotonic() + 200
    moved = 0
    while moved < 100:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
        parts = Gallery.open(tmp_path / "photo_gallery", read_only=True).parts
        moved = parts[1].count if len(parts) > 1 else 0
    for process in [running, *psutil.Process(running.pid).children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    running.communicate()
    made = Gallery.open(tmp_path / "photo_gallery", read_only=True)
    order = order_of(tmp_path / "out")
    done = [name for name in order if name != names[123]][: len(made.ids_of("new"))]
    assert 100 <= len(done) < 800
    assert made.ids_of("new") == done
    for processes in (3, 1):
        again = torchrun(processes, job)
        output, _ = again.communicate(timeout=300)
        assert again.returncode == 0, output
        if processes == 3:
            assert (
                f"backfilled {899 - len(done)} items; 900 of the order's 900 are taken up and 1 rej" in output
            )
    made.reload()
    assert made.verify() == []
    assert made.ids_of("old") == [names[123]]
    assert made.ids_of("new") == [name for name in order if name != names[123]]
    vectors = load_encoder(models[1]).encode_images(
        [tmp_path / "photos" / name for name in made.ids_of("new")]
    )
    assert np.abs(made.vectors(made.ids_of("new")) - vectors.numpy()).max() <= 1e-6
