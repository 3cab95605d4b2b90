"""Files of a saved artifact, and the names of repositories and models in them.

Files are read without running code or following links out of their directory. Models have
public names, or are paths on this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from xbt.errors import SavedPartError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
PART_FILES = (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    "projection/config.json",
    "projection/model.safetensors",
    "ensemble/config.json",
    "ensemble/model.safetensors",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
)
"""Every file that a saved artifact can have; no other file is uploaded or downloaded."""
MAX_JSON = 16 * 2**20
"""Largest JSON file that is read, in bytes; the probes of two large models need a tenth of it."""
MAX_DEPTH = 32
"""Deepest nesting of a JSON file that is read."""
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
_AGAIN = "save or download it again"

Naming = Callable[[str], str]
"""From a model's specification to the form that is written to a file, such as :func:`public_name`."""

LOCAL = "local:"
"""Prefix for models that were local paths on the uploader's machine."""
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def is_pickled(name: str) -> bool:
    """True if files with this ending may hold pickled objects."""
    return name.lower().endswith(_PICKLED)


def is_snapshot(directory: Path) -> bool:
    """True if a directory is a snapshot of one commit in the Hub cache."""
    return directory.absolute().parent.name == "snapshots"


def require_file(path: Path, directory: Path | None = None) -> Path:
    """Check that a file exists inside its directory (by default its parent), and return its path.

    A symbolic link must not leave the directory, or in a snapshot of the Hub cache its repository's folder.
    """
    root = (directory or path.parent).absolute()
    if not path.is_file():
        raise SavedPartError(f"{path} is missing: {_why_missing(root)}")
    # The Hub's cache is made of links: snapshots/COMMIT/file -> ../../blobs/HASH.
    cache = next((folder.parent for folder in (root, *root.parents) if folder.name == "snapshots"), None)
    allowed = (cache or root).resolve()
    if not path.resolve().is_relative_to(allowed):
        raise SavedPartError(
            f"{path} is a link to {path.resolve()}, outside of {allowed}; such links are not followed: put "
            "the file itself there"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that is neither too large nor nested too deeply, and holds no NaN or Infinity."""
    size = require_file(path).stat().st_size
    if size > MAX_JSON:
        raise SavedPartError(f"{path} has {size:,} bytes, but at most {MAX_JSON:,} are read of a JSON file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        _require_shallow(data)
    except RecursionError as error:
        raise SavedPartError(f"{path} is nested too deeply to be a config; {_AGAIN}") from error
    except OSError as error:
        raise SavedPartError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    except ValueError as error:  # broken UTF-8, broken JSON, numbers of thousands of digits
        raise SavedPartError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(data, dict):
        raise SavedPartError(f"{path} must hold a JSON object, got a {type(data).__name__}")
    return data


def _require_shallow(data: Any) -> None:
    """Refuse nesting that json parses but that printing, copying or comparing cannot recurse into."""
    level: list[Any] = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for group in children for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config as indented UTF-8 JSON."""
    text = json.dumps(config, indent=2, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each of these files in a directory."""
    return {name: _digest(directory / name) for name in names}


def check_digests(directory: Path, recorded: object) -> None:
    """Compare files with the digests that were recorded when they were saved, if any were."""
    if recorded is None:
        return
    if not isinstance(recorded, dict) or not set(recorded) <= set(PART_FILES):
        raise SavedPartError(
            f"the sha256 of {directory / CONFIG_NAME} must name files that xbt saves, got "
            f"{recorded!r:.200}; {_AGAIN}"
        )
    for name, digest in recorded.items():
        if _digest(require_file(directory / name, directory)) != digest:
            raise SavedPartError(
                f"{directory / name} is not the file that was saved: its SHA-256 differs from the one in "
                f"{CONFIG_NAME}; {_AGAIN}"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why_missing(directory: Path) -> str:
    pickled = sorted(file.name for file in directory.glob("*") if is_pickled(file.name))
    if pickled:
        return (
            f"there is {pickled[0]}, but unpickling it could run any code; xbt reads only safetensors and "
            "JSON, so ask for these"
        )
    return "this directory was not saved by xbt, or is incomplete"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def is_repository(name: str) -> bool:
    """True if a name has the form of a Hub repository, ``org/name``."""
    return bool(_REPO_ID.fullmatch(name)) and not name.startswith(".") and ".." not in name


def public_name(model: str) -> str:
    """A specification without paths: ``"local:NAME"`` for a directory or file of this machine.

    Args:
        model: A specification of an encoder or backbone, or the name of a space.

    Example:
        >>> public_name("open_clip:local-dir:/data/models/our-clip")
        'local:our-clip'
        >>> public_name("transformers:openai/clip-vit-large-patch14")
        'transformers:openai/clip-vit-large-patch14'
    """
    path = local_path(model)
    if path is None:
        return model
    prefix = "clip:" if model.startswith("clip:") else ""
    return f"{prefix}{LOCAL}{PurePosixPath(path.replace(chr(92), '/')).name or 'model'}"


def local_path(model: str) -> str | None:
    """The path in a specification, or ``None`` for a public name."""
    backend, _, rest = model.removeprefix("clip:").partition(":")
    if backend == "open_clip":
        if rest.startswith("local-dir:"):
            return rest.removeprefix("local-dir:")
        tag = rest.partition("/")[2]
        is_file = not rest.startswith("hf-hub:") and ("/" in tag or tag.endswith(_WEIGHTS) or _is_path(tag))
        return tag if is_file else None
    if backend == "transformers":
        return rest if _is_path(rest) or rest.count("/") > 1 or Path(rest).is_dir() else None
    return model if _is_path(model) else None


def resolved_name(model: str) -> str:
    """A specification with an absolute path in place of one that contains ``..``."""
    path = local_path(model)
    if path is None or ".." not in Path(path).parts:
        return model
    return model.replace(path, str(Path(path).expanduser().resolve()))


def require_loadable(model: str, what: str, option: str, foreign: bool) -> None:
    """Refuse a recorded specification that cannot, or must not, be loaded on this machine.

    That is a directory of the uploader's machine, a path that contains ``..``, or any path in a ``foreign``
    config, which came from the Hub. Errors name the model as ``what``, and the ``option`` that replaces it.
    """
    path = local_path(model)
    if model.startswith(LOCAL):
        name = model.removeprefix(LOCAL)
        reason = f"is '{name}', a directory of the machine that uploaded it"
    elif path is not None and ".." in re.split(r"[/\\]", path):
        reason = f"is '{model}', a path that leaves its directory and is not followed"
    elif path is not None and foreign:
        reason = f"is '{model}', a path of another machine and is not followed"
    else:
        return
    raise SavedPartError(f"{what} {reason}; pass {option} to name it here")


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../", "\\")) or bool(re.match(r"[A-Za-z]:[\\/]", text))
