"""Settings that change vectors, besides weights and preprocessing: activations and cleaning of texts.

A probe shows most differences, but not all: GELU instead of QuickGELU can change a small model's vectors by
less than rounding to half precision. So these settings are declared too. They are read from the running
model, not from its config, so that a model has the same settings in open_clip and in transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from xbt.encoders.text_batching import TextTransform

_NAMES = {
    "gelu": "gelu",
    "geluactivation": "gelu",
    "quickgelu": "quick_gelu",
    "quickgeluactivation": "quick_gelu",
    "gelutanh": "gelu_tanh",
    "pytorchgelutanh": "gelu_tanh",
    "newgeluactivation": "gelu_tanh",
    "fastgeluactivation": "gelu_tanh",
    "accurategeluactivation": "gelu_tanh",
    "siluactivation": "silu",
    "swish": "silu",
}
"""Lower-case class name of an activation in one of the libraries → name of the function."""
_LIBRARIES = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")
_CAPITALS, _PUNCTUATION = "A Red DOG", "a dog, a cat."


def activation(tower: nn.Module) -> str:
    """Name the activation functions of a tower, such as ``"quick_gelu"``, separated by commas."""
    names = set()
    for module in tower.modules():
        kind = type(module)
        name = kind.__name__.lower()
        if name in _NAMES or (kind.__module__.startswith(_LIBRARIES) and not _is_no_activation(module)):
            tanh = name == "gelu" and getattr(module, "approximate", "none") == "tanh"
            names.add("gelu_tanh" if tanh else _NAMES.get(name, name))
    return ", ".join(sorted(names)) or "none"


def _is_no_activation(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention | nn.Softmax | nn.Identity)


def text_cleaning(transform: TextTransform) -> str:
    """Test the cleaning of texts before they become tokens.

    Returns:
        ``"lower"`` if only capitals make no difference, ``"canonicalize"`` if punctuation makes none either,
        else ``"none"``. The words are open_clip's.
    """
    texts = [_CAPITALS, _CAPITALS.lower(), _PUNCTUATION, _PUNCTUATION.replace(",", "").replace(".", "")]
    rows = transform(texts).tokens.tolist()
    if rows[0] != rows[1]:
        return "none"
    return "canonicalize" if rows[2] == rows[3] else "lower"


def describe_model(
    text: nn.Module, image: nn.Module, transform: TextTransform, context: int
) -> dict[str, Any]:
    """The settings of a space besides its image preprocessing, as JSON-able values."""
    return {
        "text_activation": activation(text),
        "image_activation": activation(image),
        "text_cleaning": text_cleaning(transform),
        "context_length": context,
    }
