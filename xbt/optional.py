"""Packages of optional extras, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from xbt.errors import ConfigError


def optional(module: str, extra: str) -> Any:
    """Import a package of an optional extra.

    Args:
        module: The module, such as ``"qdrant_client"``.
        extra: The extra of xbt that installs it.

    Returns:
        The module.

    Raises:
        ConfigError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # it is installed, but one of its own requirements is not
        raise ConfigError(
            f"{error.name} is not installed, which this needs; run pip install 'xbt[{extra}]'"
        ) from error
