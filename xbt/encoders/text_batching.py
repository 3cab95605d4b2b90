"""Batches of tokens from a list of texts: each distinct text once, longest first, without needless padding.

A CLIP pads every text to its full context of 77 tokens, but a caption needs a dozen. Its text tower is causal
and reads the text at its end token, so padding after that token changes nothing. A tower that masks its
padding ignores it too. Other towers do not (SigLIP, CLIPA, CoCa with its trailing class token). The kind of a
tower is tested rather than looked up: a few texts are encoded with and without padding.
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
from xbt.errors import DataError, EncoderError

PROBES = ("", "a dog", "two children playing football in a park")
"""Texts that are encoded at the full and at a shorter context to test a tower."""

TOLERANCE = 1e-5
"""Largest difference in a coordinate between unit vectors that count as equal."""

TENSOR_CORES = 8
"""On CUDA a context is cut to a multiple of this, because tensor cores are fastest then."""

TextFeatures = Callable[[Tensor], Tensor]
"""From (n, length) tokens to (n, dim) vectors of any length."""

CHUNK = 512
"""Number of texts that a worker tokenises at a time."""

WINDOW = 32 * CHUNK
"""Number of texts that are sorted by length together; this bounds the memory for tokens."""

ALIKE = 0.9
"""Rows shorter than this fraction of a batch's longest row go into the next batch."""

MIN_ROWS = 16
"""Batches have at least this many rows, however different their lengths."""


@dataclass(frozen=True)
class ShortContext:
    """Padding that can be cut off without changing the vectors."""

    pad: int
    """The padding token."""
    keep: int
    """Padding tokens that must stay after a text: 1 if the first of them is the end token itself, as in
    transformers' CLIP tokenizer, else 0."""

    def lengths(self, tokens: Tensor) -> Tensor:
        """(n,) numbers of tokens that matter in each row of (n, length) tokens, from 1 to ``length``."""
        length = tokens.shape[1]
        positions = torch.arange(1, length + 1, device=tokens.device)
        used = torch.where(tokens != self.pad, positions, 0).amax(dim=1)
        return (used + self.keep).clamp(1, length)

    def cut(self, tokens: Tensor, multiple: int = 1) -> Tensor:
        """Cut (n, length) tokens to the length of the longest row, rounded up to a multiple."""
        if tokens.numel() == 0:
            return tokens
        return tokens[:, : self.width(int(self.lengths(tokens).max()), tokens.shape[1], multiple)]

    @staticmethod
    def width(longest: int, length: int, multiple: int) -> int:
        """The context for rows of up to ``longest`` tokens, at most ``length``."""
        return min(-(-longest // multiple) * multiple, length)


def find_short_context(features: TextFeatures, probes: Tensor) -> ShortContext | None:
    """Test if, and how far, the context of a text tower in eval mode can be cut.

    ``probes`` are the tokens of :data:`PROBES` at the full context, on the tower's device. The first row is
    the empty text, whose last token is padding. No unit vector changes by more than :data:`TOLERANCE`.
    """
    with torch.no_grad(), _full_precision(probes.device):
        whole = normalize(features(probes).float(), dim=-1)
        for keep in (0, 1):
            short = ShortContext(int(probes[0, -1]), keep)
            if _agrees(features, probes, whole, short):
                return short
    return None


def _agrees(features: TextFeatures, probes: Tensor, whole: Tensor, short: ShortContext) -> bool:
    # All texts together, where shorter ones keep some padding, and each text alone.
    groups = [probes, *(probes[row : row + 1] for row in range(len(probes)))]
    try:
        vectors = [features(group[:, : int(short.lengths(group).max())]) for group in groups]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # towers that only take full rows fail in many ways
        return False
    cut = [normalize(rows.float(), dim=-1) for rows in (vectors[0], torch.cat(vectors[1:]))]
    return all(rows.shape == whole.shape and bool((rows - whole).abs().max() <= TOLERANCE) for rows in cut)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Compute within the block so precisely that both ways can agree to :data:`TOLERANCE`."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        # From torch 2.9 on the older switch cannot be read once the newer one was used.
        switch, exact = (
            ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        )
        before = getattr(matmul, switch)
        setattr(matmul, switch, exact)
        try:
            yield
        finally:
            setattr(matmul, switch, before)


class Tokenized(NamedTuple):
    """Tokens of n texts."""

    tokens: Tensor
    """(n, context_length) int64 on the CPU."""
    cut: Tensor
    """(n,) bool, True for texts longer than the context."""


TextTransform = Callable[[list[str]], Tokenized]
"""Function from texts to tokens; picklable, without weights."""


@contextmanager
def refusing_panics(name: str) -> Iterator[None]:
    """Turn a panic of the tokenizers' Rust code, which is no ``Exception``, into an ``EncoderError``."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise EncoderError(
            f"the tokenizer of '{name}' is damaged or of another version ({error}); download it again"
        ) from error


def require_known(tokens: Tensor, vocab_size: int, name: str) -> Tensor:
    """Return the tokens if the model has an embedding for each of them."""
    highest = int(tokens.max())
    # Only tokens that occur are checked: vocabularies with spare ids at the end are common and harmless.
    if highest >= vocab_size:
        raise EncoderError(
            f"the tokenizer of {name} gives token id {highest}, but the model only embeds {vocab_size} (its "
            "vocab_size); they do not belong together"
        )
    return tokens


def as_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list; a single string, or an item that is no valid text, is refused."""
    if isinstance(texts, str | bytes):
        raise DataError(f"texts must be a list of strings, got the single text {texts!r}; write [text]")
    items = list(texts)
    for number, text in enumerate(items):
        if not isinstance(text, str):
            raise DataError(f"texts[{number}] is {text!r}, a {type(text).__name__}, but must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"texts[{number}] is not valid Unicode: {text!r} has a lone surrogate") from error
    return items


def text_cleaning(transform: TextTransform) -> str:
    """Test the cleaning of texts, in open_clip's words: ``"lower"``, ``"canonicalize"`` or ``"none"``.

    ``"lower"``: capitals make no difference. ``"canonicalize"``: neither capitals nor punctuation do.
    """
    texts = ["A Red DOG", "a red dog", "a dog, a cat.", "a dog a cat"]
    rows = transform(texts).tokens.tolist()
    if rows[0] != rows[1]:
        return "none"
    return "canonicalize" if rows[2] == rows[3] else "lower"


class TokenBatch(NamedTuple):
    """(m, length) tokens for one forward pass, on the CPU, and their (m,) rows among the distinct texts."""

    tokens: Tensor
    rows: Tensor


@dataclass
class DistinctTexts:
    """The distinct strings of a list, and the position of each.

    Attributes:
        texts: Every string once, in the order of first occurrence.
        where: (n,) int64, the position in ``texts`` of each string of the list.
    """

    texts: list[str]
    where: Tensor

    @classmethod
    def of(cls, texts: Sequence[str]) -> DistinctTexts:
        """Find the distinct strings of a list."""
        positions: dict[str, int] = {}
        where = [positions.setdefault(text, len(positions)) for text in texts]
        return cls(list(positions), torch.tensor(where, dtype=torch.int64))

    def first(self, position: int) -> int:
        """The first position in the list of the distinct string at a position in ``texts``."""
        return int(torch.nonzero(self.where == position)[0])


def tokenize_windows(
    texts: list[str], transform: TextTransform, num_workers: int
) -> Iterator[tuple[int, Tokenized]]:
    """Tokenise texts :data:`WINDOW` at a time: the position of a window's first text, and its tokens.

    Workers prepare the next window while this one is encoded.
    """
    chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
    num_workers = min(num_workers, -(-len(texts) // CHUNK))  # no idle workers
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
    """Group rows of similar length into batches, the longest first.

    Args:
        tokens: (n, context_length) int64 on the CPU.
        short: Padding that can be cut off; ``None`` leaves rows whole and in order.
        batch_size: Maximum rows per batch; batches are smaller where they would need much padding.
        multiple: The length of a batch is rounded up to a multiple of this.
        fill: Whether batches of shorter rows grow to the same number of tokens as a full batch. This is
            faster on a GPU, where small batches waste time, and slower on a CPU, because of its caches.
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
            count = min(max(alike, MIN_ROWS), batch_size)
        rows = order[start : start + count]
        yield TokenBatch(tokens[rows, :width], rows)
        start += len(rows)
