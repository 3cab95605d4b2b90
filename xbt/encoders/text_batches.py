"""From a list of texts to batches of tokens: each distinct text once, longest first, cut to what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xbt.encoders.short_context import ShortContext
from xbt.encoders.workers import run_ahead
from xbt.errors import EncoderError

CHUNK = 512
"""Texts that are tokenised at a time."""

WINDOW = 32 * CHUNK
"""Texts that are sorted by length together; what bounds the memory for tokens."""

ALIKE = 0.9
"""Rows shorter than this fraction of a batch's longest wait for the next batch, ..."""

ENOUGH = 16
"""... unless the batch would have fewer rows than this."""


class Tokenized(NamedTuple):
    """Tokens of n texts.

    Attributes:
        tokens: (n, context_length) int64 on the CPU.
        cut: (n,) bool: which texts were longer than the context.
    """

    tokens: Tensor
    cut: Tensor


TextTransform = Callable[[list[str]], Tokenized]
"""Tokenises texts; picklable, holds no weights."""


def require_known(tokens: Tensor, vocab_size: int, name: str) -> Tensor:
    """The tokens, once it is sure that the model has an embedding for each of them.

    Raises:
        EncoderError: If a token id is not below ``vocab_size``.
    """
    highest = int(tokens.max())
    # Checked on the tokens that occur: vocabularies with spare ids at the end are common and harmless.
    if highest >= vocab_size:
        raise EncoderError(
            f"the tokenizer of {name} gives token id {highest}, but the model only embeds {vocab_size} (its "
            "vocab_size); they do not belong together"
        )
    return tokens


class TokenBatch(NamedTuple):
    """Rows for one forward pass.

    Attributes:
        tokens: (m, length) int64 on the CPU.
        rows: (m,) which of the distinct texts they are.
    """

    tokens: Tensor
    rows: Tensor


@dataclass
class DistinctTexts:
    """The distinct strings of a list, and the place of each.

    Attributes:
        texts: Every string once, in the order of first occurrence.
        where: (n,) for each string of the list, its place in ``texts``.
    """

    texts: list[str]
    where: Tensor

    @classmethod
    def of(cls, texts: Sequence[str]) -> DistinctTexts:
        """Finds the distinct strings of a list."""
        places: dict[str, int] = {}
        where = [places.setdefault(text, len(places)) for text in texts]
        return cls(list(places), torch.tensor(where, dtype=torch.int64))

    def first(self, place: int) -> int:
        """The first position in the list of a distinct string."""
        return int(torch.nonzero(self.where == place)[0])


def tokenize_windows(
    texts: list[str], transform: TextTransform, num_workers: int
) -> Iterator[tuple[int, Tokenized]]:
    """Tokenises texts :data:`WINDOW` at a time; workers do the next window while this one is encoded.

    Yields:
        The place of a window's first text and the window's tokens.
    """
    chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
    num_workers = min(num_workers, -(-len(texts) // CHUNK))  # no more than there is to do
    look_ahead = WINDOW // CHUNK // max(num_workers, 1) + 1
    start, parts = 0, []
    for part in run_ahead(transform, chunks, num_workers, look_ahead):
        parts.append(part)
        if len(parts) * CHUNK == WINDOW:
            yield start, _joined(parts)
            start, parts = start + WINDOW, []
    if parts:
        yield start, _joined(parts)


def _joined(parts: list[Tokenized]) -> Tokenized:
    return Tokenized(torch.cat([part.tokens for part in parts]), torch.cat([part.cut for part in parts]))


def batches_by_length(
    tokens: Tensor, short: ShortContext | None, batch_size: int, multiple: int = 1, fill: bool = False
) -> Iterator[TokenBatch]:
    """Puts rows of about the same length together, the longest first.

    Args:
        tokens: (n, context_length) int64 on the CPU.
        short: How far rows can be cut; ``None`` leaves them whole and in order.
        batch_size: Rows per batch; fewer where shorter rows would only be filled up.
        multiple: What the length of a batch is rounded up to a multiple of.
        fill: Whether to take as many more of shorter rows as have the same number of tokens. Faster on a GPU,
            which a small batch leaves idle; slower on a CPU, whose caches a large one does not fit.

    Yields:
        Batches in which every row occurs once.
    """
    if short is None:
        for start in range(0, len(tokens), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(tokens)))
            yield TokenBatch(tokens[rows], rows)
        return
    lengths, order = short.lengths(tokens).sort(descending=True, stable=True)
    start = 0
    while start < len(tokens):
        width = short.width(int(lengths[start]), tokens.shape[1], multiple)
        if fill:
            count = batch_size * tokens.shape[1] // width
        else:
            alike = int((lengths[start:] >= ALIKE * width).sum())
            count = min(max(alike, ENOUGH), batch_size)
        rows = order[start : start + count]
        yield TokenBatch(tokens[rows, :width], rows)
        start += len(rows)
