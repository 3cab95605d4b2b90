"""Jobs of several processes: sharing the work, kills at random moments, and failing together."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import tiny
from forked import Launcher
from jobs import files, on_record, write_dataset
from pictures import SCENES, write_tar

from xbt.data import CaptionSource, read_captions
from xbt.encoders import load_encoder
from xbt.store import EmbeddingStore

IMAGES = 240


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, a folder of images and the same images in tars, with a few damaged ones."""
    root = tmp_path_factory.mktemp("data")
    tiny.tiny_open_clip(root / "model", context_length=77)
    (root / "photos").mkdir()
    for number in range(IMAGES):
        SCENES.image(number % 64).save(root / f"photos/{number:03d}.png")
    for number in (17, 90, IMAGES - 1):
        (root / f"photos/{number:03d}.png").write_bytes(b"no image")
    SCENES.image(3).convert("CMYK").save(root / "photos/003.png", "JPEG")
    for number, count in enumerate((64, 31, 50, 40)):
        write_tar(root / f"{number}.tar", 0, count)
    whole = (root / "3.tar").read_bytes()
    (root / "3.tar").write_bytes(whole[: len(whole) * 2 // 3])
    names = [f"n{number}" for number in range(60)]
    names[7], names[25], names[40], names[41], names[59] = "n3", "n0", "n1", "n30", "n0"
    write_dataset(root / "stream", names)
    return root


def arguments(data, out, kind="photos", **options):
    source = {
        "photos": ["--images.source", str(data / "photos")],
        "tars": ["--images.source", f"{data}/{{0..3}}.tar"],
        "stream": [
            "--images.source",
            f"hf:{data / 'stream'}",
            "--images.streaming",
            "true",
            "--images.id_column",
            "name",
        ],
        "captions": ["--captions.source", "scenes", "--captions.limit", "300"],
    }[kind]
    # Without decoding workers, so that limits and kills hit the process that writes.
    options = {"shard_size": 12, "batch_size": 1, "dtype": "float32", "num_workers": 0, **options}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["--encoder", f"open_clip:local-dir:{data / 'model'}", "--output_dir", str(out), *source, *flags]


@pytest.fixture(scope="module")
def whole(launcher, data):
    """Cache of uninterrupted jobs by kind."""
    made = {}

    def get(kind):
        if kind not in made:
            out = data / f"whole_{kind}"
            job = launcher.start(arguments(data, out, kind), data / f"{kind}.log")
            assert job.wait() == [0], job.said
            made[kind] = out
        return made[kind]

    return get


def assert_same(out, whole):
    store, expected = EmbeddingStore.open(out), EmbeddingStore.open(whole)
    store.verify()
    assert store.ids == expected.ids
    assert np.abs(store.read() - expected.read()).max() <= 1e-6
    for name in ("rejected.jsonl", "notes.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert files(out).keys() == files(whole).keys()  # no half-written file is left behind


@pytest.mark.parametrize("kind", ["photos", "tars", "captions", "stream"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work(launcher, data, whole, tmp_path, kind, world):
    job = launcher.start(arguments(data, tmp_path / "out", kind), tmp_path / "log", world)
    assert job.wait() == [0] * world, job.said
    assert_same(tmp_path / "out", whole(kind))
    assert job.said.count("embedded ") == 1
    assert f"process 1 of {world}" in job.said


def test_the_reference_is_right(data, whole):
    store = EmbeddingStore.open(whole("photos"))
    encoder = load_encoder(f"open_clip:local-dir:{data / 'model'}")
    paths = [data / "photos" / name for name in store.ids]
    assert len(store) == IMAGES - 3
    assert np.abs(store.read() - encoder.encode_images(paths).numpy()).max() <= 1e-6
    rejected = [each["id"] for each in on_record(store.path, "rejected.jsonl")]
    assert rejected == ["017.png", "090.png", "239.png"]
    assert on_record(store.path, "notes.jsonl") == [{"id": "003.png", "note": "CMYK converted to RGB"}]
    captions = EmbeddingStore.open(whole("captions"))
    texts = read_captions(CaptionSource("scenes", limit=300))
    assert np.abs(captions.read() - encoder.encode_texts(texts).numpy()).max() <= 1e-6


def durations(launcher, data, kind, folder):
    """Duration of a job in seconds by its number of processes."""
    taken = {}
    for world in (1, 2, 3):
        began = time.monotonic()
        job = launcher.start(arguments(data, folder / f"timed_{world}", kind), folder / "timed.log", world)
        assert job.wait() == [0] * world, job.said
        taken[world] = time.monotonic() - began
    return taken


def kill_and_continue(launcher, data, whole, kind, folder, kills, seed):
    """Kill jobs at moments spread over their duration, continue each to its end and compare.

    Every second continuation is killed as well. Only kills that met a living process count: on a noisy
    machine a job may be done sooner than it was before. Returns how many shards were committed at each kill.
    """
    draw = random.Random(seed)
    expected, taken = whole(kind), durations(launcher, data, kind, folder)
    met, tries = [], 0
    while len(met) < kills:
        out = folder / f"out_{tries}"
        for _ in range(1 + len(met) % 2):
            world = draw.choice((1, 2, 3))
            # Cycle through sevenths of the duration, so that a few kills hit all of its stages.
            seventh = (3, 5, 1, 6, 4, 2, 0)[tries % 7]
            moment = (seventh + draw.random()) / 7 * taken[world]
            job = launcher.start(arguments(data, out, kind), folder / "log", world)
            time.sleep(moment)
            alive = any(status == -9 for status in job.kill())
            tries += 1
            if not alive:
                taken[world] *= 0.9
            elif len(met) < kills:
                met.append(len(list(out.glob("in_progress/[0-9]*.json"))))
        world = draw.choice((1, 2, 3))
        job = launcher.start(arguments(data, out, kind), folder / "log", world)
        assert job.wait() == [0] * world, job.said
        assert_same(out, expected)
        assert tries < 4 * kills, f"only {len(met)} of {tries} kills met a living process"
    return met


def test_killed_at_three_moments(launcher, data, whole, tmp_path):
    assert len(kill_and_continue(launcher, data, whole, "photos", tmp_path, 3, seed=2)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["photos", "tars"])
def test_killed_at_twenty_moments(launcher, data, whole, tmp_path, kind):
    met = kill_and_continue(launcher, data, whole, kind, tmp_path, 20, seed=0)
    assert len(met) == 20
    shards = len(EmbeddingStore.open(whole(kind)).shards)
    assert sum(0 < committed < shards for committed in met) >= 3, met


def renames(launcher, data, folder):
    """Count the files that a job of three shards renames into place."""
    number = 0
    while True:
        job = launcher.start(
            _small(data, folder / f"out_{number}"), folder / "log", kill_before_rename=number
        )
        if job.wait() == [0]:
            return number
        number += 1


def _small(data, out):
    options = {"images.limit": 30, "shard_size": 10, "batch_size": 10}
    return arguments(data, out, "photos", **options)


@pytest.mark.slow
def test_killed_between_any_two_files(launcher, data, tmp_path):
    """Every file is created by a rename; kill a job before each rename and continue it."""
    job = launcher.start(_small(data, tmp_path / "whole"), tmp_path / "log")
    assert job.wait() == [0], job.said
    count = renames(launcher, data, tmp_path)
    assert count >= 15
    for number in range(count):
        job = launcher.start(_small(data, tmp_path / f"out_{number}"), tmp_path / "log")
        assert job.wait() == [0], job.said
        assert_same(tmp_path / f"out_{number}", tmp_path / "whole")


def test_killed_while_it_finishes(launcher, data, tmp_path):
    """Kill a job that has all shards, but not yet the lists, the manifest or the cleanup."""
    job = launcher.start(_small(data, tmp_path / "whole"), tmp_path / "log")
    assert job.wait() == [0], job.said
    for number in (13, 14, 15, 16):
        out = tmp_path / f"out_{number}"
        job = launcher.start(_small(data, out), tmp_path / "log", kill_before_rename=number)
        assert job.wait() == [-9], job.said
        assert len(list(out.glob("in_progress/[0-9]*.json"))) == 3
        assert not (out / "manifest.json").exists()
        assert launcher.start(_small(data, out), tmp_path / "log").wait() == [0]
        assert_same(out, tmp_path / "whole")


def test_shards_are_cut_so_that_all_processes_have_work(launcher, data, tmp_path):
    """Start with two processes, one of which fails at once, and continue with three and the same shards."""
    flags = arguments(data, tmp_path / "out", "captions", shard_size=10_000, batch_size=64)
    flags[flags.index("--captions.limit") + 1] = "520"
    job = launcher.start(flags, tmp_path / "log", world=2, fail_rank=1, fail_after=0)
    assert None not in job.wait(30)
    assert not (tmp_path / "out/manifest.json").exists()
    again = launcher.start(flags, tmp_path / "log2", world=3)
    assert again.wait() == [0, 0, 0], again.said
    store = EmbeddingStore.open(tmp_path / "out")
    assert [(shard.name, shard.count) for shard in store.shards] == [("0", 260), ("1", 260)]
    encoder = load_encoder(f"open_clip:local-dir:{data / 'model'}")
    texts = read_captions(CaptionSource("scenes", limit=520))
    assert np.abs(store.read() - encoder.encode_texts(texts).numpy()).max() <= 1e-6
    assert not list((tmp_path / "out").glob(".done*"))


def test_processes_try_again_together(launcher, data, whole, tmp_path):
    for path in (data / "photos").iterdir():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / path.name).write_bytes(b"" if path.name < "030.png" else path.read_bytes())
    flags = arguments(data, tmp_path / "out")
    flags[flags.index("--images.source") + 1] = str(tmp_path / "photos")
    assert launcher.start(flags, tmp_path / "log").wait() == [0]
    assert len(EmbeddingStore.open(tmp_path / "out")) == IMAGES - 30 - 2
    for number in range(30):
        (tmp_path / f"photos/{number:03d}.png").write_bytes((data / f"photos/{number:03d}.png").read_bytes())
    job = launcher.start([*flags, "--retry_rejected", "true"], tmp_path / "log2", world=2)
    assert job.wait() == [0, 0], job.said
    assert "tried 32 rejected items again: 29 embedded, rejected 3" in job.said
    store, reference = EmbeddingStore.open(tmp_path / "out"), EmbeddingStore.open(whole("photos"))
    store.verify()
    assert sorted(store.ids) == reference.ids
    order = np.argsort(store.ids)
    assert np.abs(store.rows(order) - reference.read()).max() <= 1e-6


@pytest.mark.parametrize("late", [2, 3, 4])
def test_killed_while_repeated_ids_are_left_out(launcher, data, whole, tmp_path, late):
    """Kill the job before the record of the first such shard, or either of its files, is replaced."""
    store = EmbeddingStore.open(whole("stream"))
    assert (len(store), len(store.shards)) == (55, 6)
    before = 4 + 3 * len(store.shards)
    job = launcher.start(
        arguments(data, tmp_path / "out", "stream"), tmp_path / "log", kill_before_rename=before + late
    )
    assert job.wait() == [-9], job.said
    assert (tmp_path / "out/in_progress/new").is_dir()
    again = launcher.start(arguments(data, tmp_path / "out", "stream"), tmp_path / "log", world=2)
    assert again.wait() == [0, 0], again.said
    assert_same(tmp_path / "out", whole("stream"))


def test_continued_at_once_after_a_kill(launcher, data, whole, tmp_path):
    """Decoding workers outlive their killed job for seconds, and must not hold its lock."""
    flags = arguments(data, tmp_path / "out", num_workers=2)
    job = launcher.start(flags, tmp_path / "log")
    while not list((tmp_path / "out").glob("in_progress/[0-9]*.json")):
        time.sleep(0.005)
    assert job.kill() == [-9]
    again = launcher.start(flags, tmp_path / "log2")
    assert again.wait() == [0], again.said
    assert_same(tmp_path / "out", whole("photos"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_others(launcher, data, whole, tmp_path, rank):
    job = launcher.start(
        arguments(data, tmp_path / "out"), tmp_path / "log", world=2, fail_rank=rank, fail_after=1
    )
    began = time.monotonic()
    statuses = job.wait()
    assert time.monotonic() - began < 20
    assert None not in statuses
    assert statuses[rank] == 1  # with a traceback, since it is a bug
    assert statuses[1 - rank] != 0
    assert "RuntimeError: a bug" in job.said
    done = len(list((tmp_path / "out").glob("in_progress/[0-9]*.json")))
    assert 1 <= done < 19  # the other process has stopped before the end
    again = launcher.start(arguments(data, tmp_path / "out"), tmp_path / "log", world=2)
    assert again.wait() == [0, 0], again.said
    assert_same(tmp_path / "out", whole("photos"))


def test_a_full_disk_keeps_finished_shards(launcher, data, whole, tmp_path):
    """A limit on the file size simulates the full disk, since the system fails in the same way."""
    flags = arguments(data, tmp_path / "out", "photos", shard_size=100)
    job = launcher.start(flags, tmp_path / "log", largest_file=100 * 16 * 4 - 1)
    assert job.wait() == [2]
    (line,) = [line for line in job.said.replace("\r", "\n").splitlines() if "error:" in line]
    assert "there is no space" in line
    assert "Traceback" not in job.said
    # The third shard of 40 items would fit, but the job ends at the first shard that does not.
    assert launcher.start(flags, tmp_path / "log2").wait() == [0]
    reference = EmbeddingStore.open(whole("photos"))
    store = EmbeddingStore.open(tmp_path / "out")
    assert store.ids == reference.ids
    assert np.abs(store.read() - reference.read()).max() <= 1e-6


def test_processes_that_see_other_items_do_not_start(launcher, data, tmp_path):
    for rank in (0, 1):
        (tmp_path / f"photos_{rank}").mkdir()
        SCENES.image(rank).save(tmp_path / f"photos_{rank}/{rank}.png")
    flags = arguments(data, tmp_path / "out")
    flags[flags.index("--images.source") + 1] = str(tmp_path / "photos_RANK")
    job = launcher.start(flags, tmp_path / "log", world=2)
    assert job.wait() == [2, 2]
    assert "process 1 finds other items in" in job.said
    assert "Traceback" not in job.said


def test_the_main_process_reports_an_error_of_another_one(launcher, data, tmp_path):
    (tmp_path / "photos_0").mkdir()
    SCENES.image(0).save(tmp_path / "photos_0/0.png")
    flags = arguments(data, tmp_path / "out")
    flags[flags.index("--images.source") + 1] = str(tmp_path / "photos_RANK")
    job = launcher.start(flags, tmp_path / "log", world=2)
    assert job.wait() == [2, 2]
    assert f"error: {tmp_path}/photos_1 does not exist" in job.said


def test_more_processes_than_parts(launcher, data, tmp_path):
    flags = arguments(data, tmp_path / "out", "tars")
    flags[flags.index("--images.source") + 1] = str(data / "1.tar")
    job = launcher.start(flags, tmp_path / "log", world=3)
    assert job.wait() == [0, 0, 0], job.said
    assert len(EmbeddingStore.open(tmp_path / "out")) == 31
