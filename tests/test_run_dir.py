from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from xbt.errors import ConfigError, StoreError
from xbt.run_dir import RunDirectory, versions, write_json
from xbt.training import TrainArgs


@dataclass
class Settings:
    noise: float = 0.5
    output_dir: str = "x"
    overwrite: bool = False
    training: TrainArgs = field(default_factory=TrainArgs)


def prepared(path, **changes):
    RunDirectory(path, Settings(**changes)).prepare()
    return path


def test_records_config_and_versions(tmp_path):
    prepared(tmp_path / "run")
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert recorded["noise"] == 0.5
    assert recorded["training"]["steps"] == 1000
    assert json.loads((tmp_path / "run/versions.json").read_text()) == versions()
    assert {"python", "torch", "transformers", "peft", "cpu_cores"} <= versions().keys()


def test_the_same_run_may_go_on_and_another_may_not(tmp_path):
    run = prepared(tmp_path / "run")
    RunDirectory(run, Settings(output_dir="elsewhere", training=TrainArgs(log_every=3, checkpoint_every=7)))
    with pytest.raises(ConfigError, match=r"noise was 0\.5 and is 0\.7"):
        RunDirectory(run, Settings(noise=0.7))
    with pytest.raises(ConfigError, match=r"training\.lr was 0\.001 and is 0\.1"):
        RunDirectory(run, Settings(training=TrainArgs(lr=0.1)))
    changed = TrainArgs(lr=0.1, steps=1, batch_size=2, seed=3, warmup_steps=0, weight_decay=0.5)
    with pytest.raises(ConfigError, match=r"and 2 more\); choose another --output_dir"):
        RunDirectory(run, Settings(training=changed))


def test_overwriting_drops_the_checkpoints(tmp_path):
    run = prepared(tmp_path / "run")
    (run / "checkpoints/step_00000010").mkdir(parents=True)
    RunDirectory(run, Settings(noise=0.7), overwrite=True).prepare()
    assert not (run / "checkpoints").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["noise"] == 0.7


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        RunDirectory(tmp_path / "file", Settings())
    with pytest.raises(ConfigError, match=r"file/below cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "below", Settings())
    with pytest.raises(ConfigError, match=r"--output_dir /proc/nope cannot be written"):
        RunDirectory("/proc/nope", Settings())
    with pytest.raises(ConfigError, match=r"x cannot be written: File name too long"):
        RunDirectory(tmp_path / ("x" * 5000), Settings())


def test_a_directory_that_may_not_be_written(tmp_path, monkeypatch):
    prepared(tmp_path / "run")

    def refuse(*arguments, dir, **options):
        asked.append(Path(dir))
        raise PermissionError(13, "Permission denied")

    asked = []
    monkeypatch.setattr("xbt.run_dir.TemporaryFile", refuse)  # whoever runs the tests may write anywhere
    for path in ("run", "other", "deep/down"):
        with pytest.raises(ConfigError, match=rf"{path} cannot be written: Permission denied"):
            RunDirectory(tmp_path / path, Settings())
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        RunDirectory(tmp_path / "run", Settings(noise=0.7))
    assert asked == [tmp_path / "run", tmp_path, tmp_path]
    monkeypatch.setenv("RANK", "1")  # the main process alone writes
    RunDirectory(tmp_path / "run", Settings())


def test_asking_whether_a_directory_can_be_written_leaves_nothing(tmp_path):
    RunDirectory(tmp_path / "deep" / "down", Settings())
    assert list(tmp_path.iterdir()) == []
    prepared(tmp_path / "run")
    RunDirectory(tmp_path / "run", Settings())
    assert {each.name for each in (tmp_path / "run").iterdir()} == {"config.yaml", "versions.json"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = write_json(tmp_path / "deep" / "a.json", {"x": 1})

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StoreError, match=r"a.json cannot be written \(disk full\)"):
        write_json(target, {"x": 2})
    assert json.loads(target.read_text()) == {"x": 1}


@dataclass
class WithTuple:
    output_dir: str = "x"
    mean: tuple[float, ...] = (0.5, 0.25)


def test_a_run_with_tuples_is_recognised(tmp_path):
    RunDirectory(tmp_path, WithTuple()).prepare()
    RunDirectory(tmp_path, WithTuple())
    with pytest.raises(ConfigError, match=r"mean was \[0.5, 0.25\] and is \[0.5, 0.5\]"):
        RunDirectory(tmp_path, WithTuple(mean=(0.5, 0.5)))


@dataclass
class Grown(Settings):
    """What Settings became in a later version."""

    own: dict[str, str] = field(default_factory=dict)
    sharpness: float = 1.0


def test_a_setting_learned_since_was_at_its_default(tmp_path):
    prepared(tmp_path, noise=0.25)
    RunDirectory(tmp_path, Grown(noise=0.25))
    with pytest.raises(ConfigError, match=r"sharpness was 1.0 and is 2.0"):
        RunDirectory(tmp_path, Grown(noise=0.25, sharpness=2.0))
    with pytest.raises(ConfigError, match=r"noise was 0.25 and is 0.5"):
        RunDirectory(tmp_path, Grown())
    RunDirectory(tmp_path / "b", Grown(own={"a": "x"})).prepare()
    RunDirectory(tmp_path / "b", Grown(own={"a": "x"}))
    with pytest.raises(ConfigError, match=r"own"):
        RunDirectory(tmp_path / "b", Grown())
