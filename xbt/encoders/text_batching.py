"""From a list of texts to batches of tokens: each distinct text once, longest first, cut to what it needs.

Exact text encoding at a shorter context: padding that cannot change a text's vector is not computed.

A CLIP pads every text to its full context, 77 tokens, of which a caption needs a dozen. Its text tower is
causal and reads the text at its end token, so what follows that token changes nothing; a tower that masks its
padding does not see it either. Others do (SigLIP, CLIPA, CoCa's trailing class token). Which kind a tower is
gets found out rather than looked up: a few texts are encoded both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xbt.encoders.image_batching import run_ahead
from xbt.errors import EncoderError

PROBES = ("", "a dog", "two children playing football in a park")
"""Texts that are encoded at the full and at a shorter context."""

TOLERANCE = 1e-5
"""Greatest difference between unit vectors that still counts as the same."""

TENSOR_CORES = 8
"""On CUDA a context is cut to a multiple of this many tokens, on which tensor cores are fastest."""

TextFeatures = Callable[[Tensor], Tensor]
"""From (n, length) tokens to (n, dim) vectors of any length."""


@dataclass(frozen=True)
class ShortContext:
    """What can be cut off tokens without changing the vectors.

    Attributes:
        pad: The token that fills rows up.
        keep: Padding tokens that must stay behind a text: 1 where the first of them is the end token itself,
            as in transformers' CLIP tokenizer, and 0 elsewhere.
    """

    pad: int
    keep: int

    def lengths(self, tokens: Tensor) -> Tensor:
        """Number of tokens that matter in each row.

        Args:
            tokens: (n, length) int64.

        Returns:
            (n,) int64, from 1 to ``length``.
        """
        length = tokens.shape[1]
        places = torch.arange(1, length + 1, device=tokens.device)
        used = torch.where(tokens != self.pad, places, 0).amax(dim=1)
        return (used + self.keep).clamp(1, length)

    def cut(self, tokens: Tensor, multiple: int = 1) -> Tensor:
        """(n, length) tokens, cut to what the longest row needs, rounded up to a multiple."""
        if tokens.numel() == 0:
            return tokens
        return tokens[:, : self.width(int(self.lengths(tokens).max()), tokens.shape[1], multiple)]

    @staticmethod
    def width(longest: int, length: int, multiple: int) -> int:
        """The context to compute for rows of ``longest`` tokens, at most ``length``."""
        return min(-(-longest // multiple) * multiple, length)


def find_short_context(features: TextFeatures, probes: Tensor) -> ShortContext | None:
    """Finds out whether, and how far, a text tower's context can be cut.

    Args:
        features: The text tower, in eval mode.
        probes: Tokens of :data:`PROBES` at the full context, on the tower's device. The first row is the
            empty text, whose last token is padding.

    Returns:
        The cut that changes no probe's unit vector by more than :data:`TOLERANCE`, or ``None``.
    """
    with torch.no_grad(), _full_precision(probes.device):
        whole = normalize(features(probes).float(), dim=-1)
        for keep in (0, 1):
            short = ShortContext(int(probes[0, -1]), keep)
            if _agrees(features, probes, whole, short):
                return short
    return None


def _agrees(features: TextFeatures, probes: Tensor, whole: Tensor, short: ShortContext) -> bool:
    # Each text alone, and all of them beside the longest, where shorter ones keep some padding.
    groups = [probes, *(probes[row : row + 1] for row in range(len(probes)))]
    try:
        vectors = [features(group[:, : int(short.lengths(group).max())]) for group in groups]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a tower that only takes full rows says so in many ways
        return False
    cut = [normalize(each.float(), dim=-1) for each in (vectors[0], torch.cat(vectors[1:]))]
    return all(each.shape == whole.shape and bool((each - whole).abs().max() <= TOLERANCE) for each in cut)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Arithmetic in which two ways to compute the same thing agree to :data:`TOLERANCE`."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        # From torch 2.9 on the older switch refuses to be read where the newer one was used.
        switch, exact = (
            ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        )
        before = getattr(matmul, switch)
        setattr(matmul, switch, exact)
        try:
            yield
        finally:
            setattr(matmul, switch, before)


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
