"""Silencing log messages of the backends, and shortening their error messages."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def _refuse(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence log messages of open_clip and transformers while a model is built.

    Problems that they only log are errors in xbt: random initialisation, missing keys, a wrong activation.
    Progress bars of downloads stay.
    """
    root, library = logging.getLogger(), logging.getLogger("transformers")
    # open_clip logs to the root logger, and the first such call would install a handler on it. A filter on
    # the root logger silences only these messages: it does not see records that other loggers propagate.
    placeholder = logging.NullHandler()
    root.addHandler(placeholder)
    root.addFilter(_refuse)
    level = library.level
    library.setLevel(logging.CRITICAL)
    bars = sys.modules.get("transformers.utils.logging")
    had_bars = bars is not None and bars.is_progress_bar_enabled()
    if bars is not None:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        root.removeHandler(placeholder)
        root.removeFilter(_refuse)
        library.setLevel(level)
        if bars is not None and had_bars:
            bars.enable_progress_bar()


def brief(error: BaseException, limit: int = 600) -> str:
    """Shorten another library's error to one line, for use inside a sentence.

    Colours and line breaks are removed. A very long message loses its middle, because its first words say
    what happened and its last words what to do.
    """
    text = " ".join(_COLOURS.sub("", str(error)).split()) or type(error).__name__
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} … {text[-half:]}"
