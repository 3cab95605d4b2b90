"""A run's directory: the resolved config, the versions that made it, its checkpoints and its results."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import yaml

from xbt.config import config_to_dict, config_to_yaml, flatten, is_main_process, require_local
from xbt.errors import ConfigError, StoreError
from xbt.files import write_lines

_CONFIG = "config.yaml"
_NOT_IDENTITY = frozenset(
    ["overwrite", "output_dir"]
    + [
        f"training.{name}"
        for name in ("log_with", "log_every", "checkpoint_every", "keep_checkpoints", "num_workers")
    ]
)
"""Settings that may change when a run is continued: they do not change its result."""
_PACKAGES = (
    "xbt", "torch", "torchvision", "transformers", "open_clip_torch", "peft", "accelerate", "datasets",
    "faiss-cpu", "huggingface_hub", "safetensors", "numpy", "pillow",
)  # fmt: skip


def versions() -> dict[str, str | int]:
    """Versions of xbt, its core packages, Python and the machine, for the record beside every result."""
    found: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    found["cpu_cores"] = os.cpu_count() or 0
    found["torch_threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_json(path: Path, data: Any) -> Path:
    """Writes a JSON file whole and durably; see :func:`xbt.files.write_whole`.

    Raises:
        StoreError: If the disk is full or the place cannot be written; the old file is kept.
    """
    write_lines(path, [json.dumps(data, indent=2) + "\n"])
    return path


class RunDirectory:
    """Where one run keeps everything, and how a killed run is recognised as the same run.

    Args:
        path: The directory; made when :meth:`prepare` is called.
        config: The run's config dataclass.
        overwrite: Start afresh even if the directory holds a run.
        may_change: Further settings that may be others when the run is continued.

    Raises:
        ConfigError: If the directory is a URL, or holds a run with other settings and ``overwrite`` is not
            given; the message lists what differs. In the main process also if it cannot be written.
    """

    def __init__(
        self, path: str | Path, config: Any, overwrite: bool = False, may_change: Iterable[str] = ()
    ) -> None:
        require_local(path, "--output_dir")
        self.path = Path(path)
        self._free = _NOT_IDENTITY.union(may_change)
        self._config = config
        self._overwrite = overwrite
        try:
            nearest = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        except OSError as error:
            raise self._unwritable(error) from error
        if nearest == self.path and not self.path.is_dir():
            raise ConfigError(f"--output_dir {self.path} is a file; give a directory")
        if not overwrite:
            self._refuse_other_run()
        if is_main_process():
            self._require_writable(nearest)

    def prepare(self) -> None:
        """Makes the directory and records config and versions; the main process alone calls this.

        Raises:
            ConfigError: If the directory cannot be written.
        """
        try:
            if self._overwrite:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            write_lines(self.path / _CONFIG, [config_to_yaml(self._config)])
        except StoreError as error:
            raise self._unwritable(error.__cause__ or error) from error
        self.write_json("versions.json", versions())

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    def write_json(self, name: str, data: Any) -> Path:
        """Writes one JSON file into the directory; see :func:`write_json`."""
        return write_json(self.path / name, data)

    def _require_writable(self, nearest: Path) -> None:
        """Tries to write into the directory, or where it will be made, and leaves nothing there."""
        # Asked now: hours later, when there is something to write, the answer comes too late.
        try:
            with TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: BaseException) -> ConfigError:
        reason = getattr(error, "strerror", None) or error
        return ConfigError(f"--output_dir {self.path} cannot be written: {reason}; give a directory that can")

    def _refuse_other_run(self) -> None:
        recorded = self.path / _CONFIG
        if not recorded.is_file():
            return
        known = yaml.safe_load(recorded.read_text(encoding="utf-8")) or {}
        # A setting that xbt has learned since was at what is now its default.
        there = self._identity(_as_read_back(_filled(known, self._config)))
        now = self._identity(_as_read_back(config_to_dict(self._config)))
        changed = [key for key in sorted(there.keys() | now.keys()) if there.get(key) != now.get(key)]
        if changed:
            listed = ", ".join(f"{key} was {there.get(key)!r} and is {now.get(key)!r}" for key in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise ConfigError(
                f"{self.path} holds a run with other settings ({listed}{more}); "
                "choose another --output_dir, or pass --overwrite true to start afresh there"
            )

    def _identity(self, config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in flatten(config).items() if key not in self._free}


def _as_read_back(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it comes out of its YAML file: tuples are lists."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config))
    return plain


def _filled(recorded: dict[str, Any], config: Any) -> dict[str, Any]:
    """A recorded config with the default of every field that was not known when it was recorded."""
    filled = dict(recorded)
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name in recorded:
            if is_dataclass(value) and isinstance(recorded[each.name], dict):
                filled[each.name] = _filled(recorded[each.name], value)
        elif each.default is not MISSING:
            filled[each.name] = each.default
        elif each.default_factory is not MISSING:
            made = each.default_factory()
            filled[each.name] = asdict(made) if is_dataclass(made) and not isinstance(made, type) else made
    return filled
