"""Exact text encoding at a shorter context: padding that cannot change a text's vector is not computed.

A CLIP pads every text to its full context, 77 tokens, of which a caption needs a dozen. Its text tower is
causal and reads the text at its end token, so what follows that token changes nothing; a tower that masks its
padding does not see it either. Others do (SigLIP, CLIPA, CoCa's trailing class token). Which kind a tower is
gets found out rather than looked up: a few texts are encoded both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
