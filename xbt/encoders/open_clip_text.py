"""open_clip's texts: tokens, counted where they are cut, and text towers at a shorter context."""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip.tokenizer import SigLipTokenizer, SimpleTokenizer, basic_clean, canonicalize_text
from torch import Tensor, nn

from xbt.encoders.text_batches import Tokenized, require_known


class OpenClipTexts:
    """Texts to tokens with a tokenizer of open_clip; picklable, holds no weights.

    Args:
        name: The encoder's name, for errors.
        tokenizer: open_clip's tokenizer.
        vocab_size: Number of tokens the model embeds.
    """

    def __init__(self, name: str, tokenizer: Any, vocab_size: int) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def __call__(self, texts: list[str]) -> Tokenized:
        """Tokenises n texts, and finds those that were cut."""
        tokenizer, context = self._tokenizer, int(self._tokenizer.context_length)
        if not texts:
            return Tokenized(torch.zeros(0, context, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
        tokens = require_known(tokenizer(texts), self._vocab_size, self._name)
        pad = 0
        if not isinstance(tokenizer, SimpleTokenizer):
            pad = tokenizer.tokenizer.pad_token_id
        # A text can only have been cut where the row is full; the last position alone does not show it where
        # the padding token is the end token. Counting a text again is only needed for those rows.
        full = (tokens[:, -2:] != pad).any(dim=1)
        cut = [suspect and self._length(text) > context for text, suspect in zip(texts, full, strict=True)]
        return Tokenized(tokens, torch.tensor(cut))

    def _length(self, text: str) -> int:
        """Number of tokens of a text before cutting, special tokens included."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, SimpleTokenizer):
            return len(tokenizer.encode(text)) + 2
        if isinstance(tokenizer, SigLipTokenizer):
            cleaned = canonicalize_text(basic_clean(text))
        else:
            cleaned = tokenizer.clean_fn(text)
        own_frame = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # begin, end and class token, by hand
        ids = tokenizer.tokenizer(cleaned, add_special_tokens=not own_frame, verbose=False).input_ids
        return len(ids) + (3 if own_frame else 0)


def encode_tokens(clip: Any, tokens: Tensor) -> Tensor:
    """``clip.encode_text`` for tokens that may be shorter than the context.

    Args:
        clip: A model of open_clip, without peft around it.
        tokens: (n, length) int64 on its device.

    Returns:
        (n, dim) vectors of any length, differentiable in all weights.
    """
    tower, length = getattr(clip, "text", clip), tokens.shape[1]
    # Text models of transformers have positions of their own and take any length.
    if hasattr(tower, "positional_embedding") and length < tower.context_length:
        positions, mask = tower.positional_embedding, tower.attn_mask
        short = _with(
            tower,
            positional_embedding=positions[:length],
            attn_mask=None if mask is None else mask[:length, :length],
        )
        clip = short if tower is clip else _with(clip, text=short)
    features: Tensor = clip.encode_text(tokens)
    return features


def _with(module: nn.Module, **attributes: Any) -> nn.Module:
    """A module that shares everything with another one but some attributes.

    The original stays untouched, unlike with ``torch.func.functional_call``: other threads may be using it.
    """
    view = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        held = getattr(module, registry)
        view.__dict__[registry] = {name: held[name] for name in held if name not in attributes}
    view.__dict__.update(attributes)
    return view
