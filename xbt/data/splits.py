"""What the option ``split`` may say: one name, several joined by ``+``, or ``all``."""

from __future__ import annotations

from collections.abc import Sequence

from xbt.errors import DataError

ALL_SPLITS = "all"


def choose_splits(split: str | None, present: Sequence[str], where: str) -> list[str]:
    """Reads the option ``split``.

    Args:
        split: A name, several joined by ``+`` (``"val+restval"``), ``"all"``, or ``None`` for all as well.
        present: The splits that there are.
        where: What to call the source in the error.

    Returns:
        The chosen names, each once, in the order of ``present``.

    Raises:
        DataError: If a split does not exist; the message lists those that do.
    """
    if split is None or (split.strip() == ALL_SPLITS and ALL_SPLITS not in present):
        return list(present)
    wanted = [name.strip() for name in split.split("+")]
    for name in wanted:
        if name not in present:
            raise DataError(f"{where} has no split {name!r}; it has {', '.join(present)}")
    return [name for name in present if name in wanted]
