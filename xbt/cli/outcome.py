"""What a command has found: for people, and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xbt.errors import XbtError


@dataclass(frozen=True)
class Outcome:
    """What a command has found.

    Attributes:
        document: JSON-able, for ``--json``.
        text: For people, without a newline at the end.
        status: Exit status: 0, or 1 for an answer that is no.
        error: What ends the command after all, once people have been shown the text.
    """

    document: Mapping[str, Any]
    text: str
    status: int = 0
    error: XbtError | None = None

    def to_json(self) -> str:
        """The document as JSON of ASCII characters, which every terminal and pipe can carry."""
        return as_json(self.document)


def as_json(document: Mapping[str, Any]) -> str:
    """JSON with what JSON does not know in its nearest form: paths as strings, NaN and infinity as null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
