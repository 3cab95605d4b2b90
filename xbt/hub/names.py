"""Names: of Hub repositories, and of models, public or paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from xbt.errors import SavedPartError

Naming = Callable[[str], str]
"""From a model's specification to the form that is written to a file, such as :func:`public_name`."""

LOCAL = "local:"
"""Prefix for models that were local paths on the uploader's machine."""
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


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

    Args:
        model: The specification that a config records.
        what: Name of the model in errors, such as ``"the base model recorded in DIR"``.
        option: The option that names another model.
        foreign: Whether the config came from the Hub, so that its paths belong to another machine.

    Raises:
        SavedPartError: If it was a directory of the uploader's machine, or a path that contains ``..``, or
            any path in a foreign config.
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
