"""LoRA on both towers of an encoder, in peft's own format.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds ``alpha / rank · B A`` to chosen weight matrices
and trains only A and B.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xbt.encoders.base import DualEncoder
from xbt.encoders.lora_loading import (
    ADAPTABLE,
    WEIGHTS_FILE,
    adaptable,
    default_pattern,
    exact_pattern,
    read_lora,
)
from xbt.encoders.quiet import brief, quiet
from xbt.errors import ConfigError, EncoderError
from xbt.hub import SavedPartError, read_tensors


@dataclass
class LoraSettings:
    """Size and target modules of a LoRA."""

    rank: int = 8
    """Rank of the update of each adapted weight matrix."""
    alpha: float = 16.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an input of the update during training; only for transformers models."""
    target_modules: str | list[str] | None = None
    """A regular expression for full module names, or a list of name endings; the attention of both towers by
    default."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}, but must be at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha is {self.alpha}, but must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}, but must be at least 0 and less than 1")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ConfigError(
                    f"lora.target_modules '{self.target_modules}' is not a regular expression: {error}"
                ) from error


def add_lora(encoder: DualEncoder, settings: LoraSettings) -> None:
    """Add a new LoRA to an encoder; afterwards only the LoRA's weights require gradients.

    The update starts at zero, so the encoder's vectors do not change.

    Args:
        encoder: Changed in place: ``encoder.module`` becomes a peft model.
        settings: Rank, scale and target modules.

    Raises:
        EncoderError: If the encoder already has LoRA, or the targets match no module or one that LoRA does
            not support, or one tower has no default target.
        ConfigError: If dropout is set where peft would ignore it.
    """
    from peft import LoraConfig

    size = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    _attach(encoder, LoraConfig(target_modules=check_lora(encoder, settings), **size))


def check_lora(encoder: DualEncoder, settings: LoraSettings) -> str:
    """Check that :func:`add_lora` will accept the settings, before anything slow is done with the encoder.

    Args:
        encoder: Not changed.
        settings: Rank, scale and target modules.

    Returns:
        The target modules as one regular expression for full names.

    Raises:
        EncoderError, ConfigError: As :func:`add_lora`.
    """
    _require_bare(encoder)
    pattern = _pattern(encoder, settings.target_modules)
    if settings.dropout and any(isinstance(m, nn.MultiheadAttention) for m in _matches(encoder, pattern)):
        raise ConfigError(
            f"lora.dropout is {settings.dropout}, but {encoder.name} has nn.MultiheadAttention layers, where "
            "there is nothing to drop; set it to 0"
        )
    return pattern


def set_lora_mode(towers: nn.Module, training: bool) -> None:
    """Set the mode of a frozen model that LoRA trains: only the LoRA's dropout follows.

    The frozen layers stay in evaluation mode: their batch statistics do not change, and their own dropout,
    which many text towers have, stays off.
    """
    towers.eval()
    for name, module in towers.named_modules():
        if ".lora_dropout" in name:
            module.train(training)


def save_lora(encoder: DualEncoder, directory: str | Path) -> None:
    """Write the LoRA of an encoder as ``adapter_config.json`` and ``adapter_model.safetensors``.

    The base model is not written. A merged adapter gives the same bytes as an unmerged one.

    Args:
        encoder: An encoder with LoRA.
        directory: Made if it does not exist.

    Raises:
        EncoderError: If the encoder has no LoRA.
    """
    if not has_lora(encoder):
        raise EncoderError(f"{encoder.name} has no LoRA to save; add one with add_lora")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    from peft import get_peft_model_state_dict

    # By default peft would query the Hub to see if the vocabulary was resized.
    weights = get_peft_model_state_dict(encoder.module, save_embedding_layers=False)
    state = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    module: Any = encoder.module
    config = module.peft_config["default"]
    was_inference, base = config.inference_mode, config.base_model_name_or_path
    # Local paths are not saved; the caller records the base model.
    config.inference_mode, config.base_model_name_or_path = True, None
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.base_model_name_or_path = was_inference, base


def load_lora(
    encoder: DualEncoder, directory: str | Path, merge: bool = True, trainable: bool = False
) -> None:
    """Add a saved LoRA to an encoder.

    Args:
        encoder: Changed in place.
        directory: A directory that :func:`save_lora` or peft wrote.
        merge: Whether to add the update to the weights, so that serving costs nothing extra.
        trainable: Whether its weights require gradients; needs ``merge=False``.

    Raises:
        EncoderError: If the encoder already has LoRA, or the directory holds no readable LoRA, or a LoRA of
            another model: every weight must exist and have the right shape. The encoder is not changed then.
        ConfigError: If both ``merge`` and ``trainable`` are set.
    """
    if merge and trainable:
        raise ConfigError("a merged LoRA receives no gradients; pass merge=False to train it")
    _require_bare(encoder)
    folder = Path(directory)
    config = read_lora(encoder, folder)
    try:
        state = read_tensors(folder / WEIGHTS_FILE)
        _attach(encoder, config)
        _set(encoder, state)
    except (SavedPartError, EncoderError) as error:
        raise EncoderError(f"the adapter in {folder} cannot be used: {error}") from error
    module: Any = encoder.module
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable and ".lora_" in name)
    if merge:
        with torch.no_grad(), warnings.catch_warnings():
            # peft visits the output projection of an attention layer twice and warns about it.
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            module.merge_adapter()
    encoder.invalidate_space()


def has_lora(encoder: DualEncoder) -> bool:
    """True if an encoder has LoRA attached, merged or not."""
    return hasattr(encoder.module, "peft_config")


def _require_bare(encoder: DualEncoder) -> None:
    if has_lora(encoder):
        raise EncoderError(f"{encoder.name} has LoRA already; load the encoder again")


def _attach(encoder: DualEncoder, config: Any) -> None:
    from peft import get_peft_model

    from xbt.encoders.lora_attention import ExactAttention

    _matches(encoder, config.target_modules)
    config._register_custom_module({nn.MultiheadAttention: ExactAttention})
    training = encoder.module.training
    try:
        with quiet(), warnings.catch_warnings():
            # peft uses a deprecated name of a property of transformers.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            encoder.module = get_peft_model(encoder.module, config)
    except (ValueError, TypeError) as error:
        raise EncoderError(f"peft cannot put LoRA on {encoder.name}: {brief(error)}") from error
    encoder.module.train(training)
    encoder.invalidate_space()


def _set(encoder: DualEncoder, state: dict[str, Tensor]) -> None:
    """Set the LoRA's weights; if an update is not finite, remove the LoRA and raise an EncoderError."""
    from peft import set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    module: Any = encoder.module
    set_peft_model_state_dict(module, state)
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            with torch.no_grad():
                update = layer.get_delta_weight("default")
            if not torch.isfinite(update).all():
                encoder.module = module.unload()
                raise EncoderError(f"its update of {name} holds NaN or infinite values; train it again")


def _pattern(encoder: DualEncoder, targets: str | list[str] | None) -> str:
    """The targets as one regular expression for full module names.

    It is saved with the adapter. It is the encoder's default or consists of plain names, so that loading
    never has to run any other expression.
    """
    if targets is not None:
        named = targets if isinstance(targets, str) else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
        _matches(encoder, named)
        return exact_pattern(_named(encoder, named))
    for tower, pattern in encoder.lora_targets.items():
        if not _named(encoder, pattern):
            raise EncoderError(
                f"the {tower} tower of {encoder.name} has no attention that LoRA supports; set "
                f"lora.target_modules to modules it has, such as {_examples(encoder)}"
            )
    return default_pattern(encoder)


def _named(encoder: DualEncoder, pattern: str) -> dict[str, nn.Module]:
    return {name: module for name, module in encoder.module.named_modules() if re.fullmatch(pattern, name)}


def _matches(encoder: DualEncoder, pattern: str) -> list[nn.Module]:
    """The modules that a pattern matches; all of them must support LoRA."""
    matches = _named(encoder, pattern)
    if not matches:
        raise EncoderError(
            f"lora.target_modules '{pattern}' matches no module of {encoder.name}, which has, for example, "
            f"{_examples(encoder)}"
        )
    fit = adaptable(encoder)
    for name, module in matches.items():
        if name not in fit:
            inner = ", whose parent must be named instead" if isinstance(module, ADAPTABLE) else ""
            raise EncoderError(
                f"lora.target_modules '{pattern}' matches {name} of {encoder.name}, a {type(module).__name__}"
                f"{inner}; LoRA supports modules such as {_examples(encoder)}"
            )
    return list(matches.values())


def _examples(encoder: DualEncoder) -> str:
    attention = [name for name, m in encoder.module.named_modules() if isinstance(m, nn.MultiheadAttention)]
    linear = [name for name, m in encoder.module.named_modules() if type(m) is nn.Linear]
    names = attention[:1] + attention[-1:] + linear
    return ", ".join(names[:4])
