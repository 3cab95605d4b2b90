"""Names of models that mean the same on every machine, and those that are paths of this one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from xbt.errors import SavedPartError

Naming = Callable[[str], str]
"""How a model's specification is written down: as it is, or without paths of this machine."""

LOCAL = "local:"
"""What stands before the name of a model that was a directory of whoever shared it."""
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def public_name(model: str) -> str:
    """A specification without any path: ``"local:NAME"`` for what is a directory or file of this machine.

    Args:
        model: A specification of an encoder or backbone, or whatever a space is called.

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
    """The path in a specification, or ``None`` where it is a name that holds everywhere."""
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
    """A specification whose path, if it climbs by ``..``, is written from the root."""
    path = local_path(model)
    if path is None or ".." not in Path(path).parts:
        return model
    return model.replace(path, str(Path(path).expanduser().resolve()))


def require_loadable(model: str, what: str, option: str, foreign: bool) -> None:
    """Refuses a recorded specification that does not mean a model of this machine's owner.

    Args:
        model: The specification that a config records.
        what: What to call the model, such as ``"the base model recorded in DIR"``.
        option: The option that names it.
        foreign: Whether the config came from the Hub, so that its paths are somebody else's.

    Raises:
        SavedPartError: If it was a directory of whoever shared it, or a path that climbs by ``..``, or any
            path in a foreign config.
    """
    path = local_path(model)
    if model.startswith(LOCAL):
        name = model.removeprefix(LOCAL)
        reason = f"is '{name}', a directory of the machine that it was shared from"
    elif path is not None and ".." in re.split(r"[/\\]", path):
        reason = f"is '{model}', a path that climbs out of its directory, and is not followed"
    elif path is not None and foreign:
        reason = f"is '{model}', a path of another machine, and is not followed"
    else:
        return
    raise SavedPartError(f"{what} {reason}; pass {option} to name it here")


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../", "\\")) or bool(re.match(r"[A-Za-z]:[\\/]", text))
