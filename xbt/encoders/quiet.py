"""Keeping the backends' chatter out of the user's terminal, and their errors to one sentence."""

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
    """Silences what open_clip and transformers say while a model is built.

    Everything they only log is checked by xbt and raised where it matters: random initialisation, missing
    keys, a wrong activation. Progress bars of downloads stay.
    """
    root, library = logging.getLogger(), logging.getLogger("transformers")
    # open_clip logs straight to the root logger, and the first such call would install a handler on it. A
    # filter on the root silences that alone: it does not see what other loggers propagate.
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
    """An error of another library in one line, for use inside a sentence.

    Colours and line breaks are taken out. Of a very long message the middle is left out: its first words say
    what happened, and its last ones what to do.
    """
    text = " ".join(_COLOURS.sub("", str(error)).split()) or type(error).__name__
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} … {text[-half:]}"
