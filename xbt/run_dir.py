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

from xbt.config import config_to_dict, config_to_yaml, flatten, require_local
from xbt.errors import ConfigError, StoreError
from xbt.files import write_lines
from xbt.processes import is_main_process

_CONFIG = "config.yaml"
_NOT_IDENTITY = frozenset(
    ["overwrite", "output_dir"]
    + [
        f"training.{name}"
        for name in ("log_with", "log_every", "checkpoint_every", "keep_checkpoints", "num_workers")
    ]
)
"""Settings that may change when a run continues, because they do not affect its result."""
_PACKAGES = (
    "xbt", "torch", "torchvision", "transformers", "open_clip_torch", "peft", "accelerate", "datasets",
    "faiss-cpu", "huggingface_hub", "safetensors", "numpy", "pillow",
)  # fmt: skip


def versions() -> dict[str, str | int]:
    """Versions of xbt, its core packages, Python and the machine; recorded beside every result."""
    recorded: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            recorded[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            recorded[package] = "not installed as a package"
    recorded["cpu_cores"] = os.cpu_count() or 0
    recorded["torch_threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        recorded["gpu"] = torch.cuda.get_device_name()
    return recorded


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file durably; see :func:`xbt.files.write_whole`.

    Raises:
        StoreError: If the disk is full or the file cannot be written; the old file is kept.
    """
    write_lines(path, [json.dumps(data, indent=2) + "\n"])
    return path


class RunDirectory:
    """Directory of one run; its recorded config tells whether a killed run may continue there.

    Args:
        path: The directory; :meth:`prepare` creates it.
        config: The run's config dataclass.
        overwrite: Start from scratch even if the directory holds a run.
        may_change: Further settings that may differ when the run continues.

    Raises:
        ConfigError: If the directory is a URL, or holds a run with other settings and ``overwrite`` is not
            given; the message lists the differences. In the main process also if it cannot be written.
    """

    def __init__(
        self, path: str | Path, config: Any, overwrite: bool = False, may_change: Iterable[str] = ()
    ) -> None:
        require_local(path, "--output_dir")
        self.path = Path(path)
        self._may_change = _NOT_IDENTITY.union(may_change)
        self._config = config
        self._overwrite = overwrite
        try:
            nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        except OSError as error:
            raise self._unwritable(error) from error
        if nearest == self.path and not self.path.is_dir():
            raise ConfigError(f"--output_dir {self.path} is a file; give a directory")
        if not overwrite:
            self._refuse_other_run()
        if is_main_process():
            self._require_writable(nearest)

    def prepare(self) -> None:
        """Create the directory and record config and versions; only the main process calls this.

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
        """Write one JSON file into the directory; see :func:`write_json`."""
        return write_json(self.path / name, data)

    def _require_writable(self, nearest: Path) -> None:
        """Create and remove a temporary file in the directory or its nearest existing parent."""
        # Checked at the start: hours later the results would be lost.
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
        settings = yaml.safe_load(recorded.read_text(encoding="utf-8")) or {}
        # A setting added to xbt since then had the value that is its default now.
        old = self._identity(_as_read_back(_with_defaults(settings, self._config)))
        new = self._identity(_as_read_back(config_to_dict(self._config)))
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if changed:
            listed = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise ConfigError(
                f"{self.path} holds a run with other settings ({listed}{more}); "
                "choose another --output_dir, or pass --overwrite true to start from scratch there"
            )

    def _identity(self, config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in flatten(config).items() if key not in self._may_change}


def _as_read_back(config: dict[str, Any]) -> dict[str, Any]:
    """Convert a config to the form that it has after reading its YAML file: tuples become lists."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config))
    return plain


def _with_defaults(recorded: dict[str, Any], config: Any) -> dict[str, Any]:
    """Add the defaults of fields that did not exist when the config was recorded."""
    filled = dict(recorded)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in recorded:
            if is_dataclass(value) and isinstance(recorded[field.name], dict):
                filled[field.name] = _with_defaults(recorded[field.name], value)
        elif field.default is not MISSING:
            filled[field.name] = field.default
        elif field.default_factory is not MISSING:
            made = field.default_factory()
            filled[field.name] = asdict(made) if is_dataclass(made) and not isinstance(made, type) else made
    return filled
