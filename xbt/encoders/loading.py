"""Loading an encoder from its specification."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch

from xbt.encoders.base import DualEncoder
from xbt.encoders.quiet import brief, quiet
from xbt.errors import EncoderError
from xbt.hub import HubAccess, SavedPartError

FORMS = (
    "open_clip:ARCH/PRETRAINED (a tag or a weights file)",
    "open_clip:local-dir:PATH",
    "open_clip:hf-hub:org/repo (or org/repo@revision)",
    "transformers:REPO_OR_DIR (or org/repo@revision)",
)
"""Every form a specification can take."""
_BACKENDS = {"open_clip": "xbt.encoders.open_clip", "transformers": "xbt.encoders.hf_transformers"}


def load_encoder(
    spec: str,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> DualEncoder:
    """Load a CLIP as a frozen dual encoder.

    From the Hub only safetensors and JSON are loaded, and no code is run.

    Args:
        spec: One of ``"open_clip:ARCH/PRETRAINED"`` (a pretrained tag or a weights file),
            ``"open_clip:local-dir:PATH"``, ``"open_clip:hf-hub:org/repo"`` and
            ``"transformers:REPO_OR_DIR"``; a repository may be followed by ``@`` and a branch, tag or commit.
        device: Device of the weights.
        revision: Branch, tag or commit of the repository; overrides the one in ``spec``.
        cache_dir: The Hub cache to use instead of the default one.
        token: Hub access token, for private repositories.
        local_files_only: Use the cache alone.

    Returns:
        The encoder: fp32, eval mode, without gradients.

    Raises:
        EncoderError: If the specification is malformed, or the model cannot be loaded, or would be loaded
            wrongly: with random weights, another activation, or a tokenizer of another model.

    Example:
        >>> encoder = load_encoder("open_clip:ViT-B-32-quickgelu/openai")  # doctest: +SKIP
        >>> encoder.encode_texts(["a dog on a beach"]).shape  # doctest: +SKIP
        torch.Size([1, 512])
    """
    loader, rest = _parse(spec)
    try:
        with quiet():
            encoder = loader(rest, spec, HubAccess(revision, cache_dir, token, local_files_only))
    except EncoderError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, SavedPartError) else brief(error)
        raise EncoderError(f"'{spec}' could not be loaded: {reason}") from error
    try:
        encoder.try_towers()
    except Exception as error:  # invalid config values fail where they are first used
        raise EncoderError(
            f"'{spec}' was loaded, but cannot encode ({type(error).__name__}: {brief(error)}); "
            "check its config"
        ) from error
    try:
        return encoder.to(device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"'{spec}' could not be moved to device '{device}': {brief(error)}") from error


def _parse(spec: str) -> tuple[Callable[[str, str, HubAccess], DualEncoder], str]:
    backend, _, rest = str(spec).partition(":")
    if backend == "open_clip":
        prefixed = rest.startswith(("local-dir:", "hf-hub:"))
        head, _, tail = rest.partition(":" if prefixed else "/")
        complete = bool(head and tail)
    else:
        complete = backend == "transformers" and bool(rest)
    if not complete:
        raise EncoderError(f"'{spec}' is not an encoder specification; write one of: {'; '.join(FORMS)}")
    # Imported late, because open_clip and transformers take seconds.
    module = importlib.import_module(_BACKENDS[backend])
    loader: Callable[[str, str, HubAccess], DualEncoder] = getattr(module, f"load_{backend}")
    return loader, rest
