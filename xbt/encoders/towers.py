"""Modules of a model's towers: their activation functions, and folding a matrix into their last layers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from xbt.errors import EncoderError

_ACTIVATIONS = {
    **{"gelu": "gelu", "quickgelu": "quick_gelu", "silu": "silu", "swish": "silu"},
    **dict.fromkeys(("gelutanh", "pytorchgelutanh", "newgelu", "fastgelu", "accurategelu"), "gelu_tanh"),
}
"""Class name of an activation in one of the libraries, in lower case → name of the function."""
_LIBRARIES = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")


def activation(tower: nn.Module) -> str:
    """Name the activation functions of a tower, such as ``"quick_gelu"``, separated by commas."""
    names = set()
    for module in tower.modules():
        kind = type(module)
        name = kind.__name__.lower()
        short = name.removesuffix("activation")
        others = isinstance(module, nn.MultiheadAttention | nn.Softmax | nn.Identity)
        if short in _ACTIVATIONS or (kind.__module__.startswith(_LIBRARIES) and not others):
            tanh = name == "gelu" and getattr(module, "approximate", "none") == "tanh"
            names.add("gelu_tanh" if tanh else _ACTIVATIONS.get(short, name))
    return ", ".join(sorted(names)) or "none"


def fold_layers(module: nn.Module, layers: Mapping[str, str], weight: Tensor, name: str) -> nn.Module:
    """Multiply a matrix into the last layer of each tower, so that mapping vectors costs nothing.

    A tower ends in z ∝ P x. Mapped by W, its unit vectors are normalise(W z) = normalise((W P) x), so that
    replacing P by W P gives the mapped vectors without another step.

    ``layers`` gives each tower's path of an ``nn.Linear``, or of an (in, dim) parameter that rows are
    multiplied with. The result shares all other weights with the model, which does not change.
    """
    folded = module
    for tower, path in layers.items():
        layer = at_path(module, path)
        if type(layer) is not nn.Linear and not (isinstance(layer, nn.Parameter) and layer.ndim == 2):
            last = "nothing" if layer is None else f"a {type(layer).__name__}"
            raise EncoderError(
                f"the {tower} tower of {name} ends in {last} at {path}, not in a matrix, so the projection "
                "cannot be folded into it; use it unfolded"
            )
        folded = _with_layer(folded, path, _composed(layer, weight))
    return folded


def at_path(module: Any, path: str) -> Any:
    """The attribute of a module at a dotted path; ``None`` if there is none."""
    for step in path.split("."):
        module = getattr(module, step, None)
    return module


def _composed(layer: nn.Linear | nn.Parameter, weight: Tensor) -> nn.Linear | nn.Parameter:
    with torch.no_grad():
        if isinstance(layer, nn.Parameter):
            matrix = weight.to(layer.device, torch.float64)
            return nn.Parameter((layer.double() @ matrix.T).to(layer.dtype), requires_grad=False)
        old = layer.weight
        matrix = weight.to(old.device, torch.float64)
        bias = layer.bias is not None
        product = nn.Linear(layer.in_features, len(weight), bias, device=old.device, dtype=old.dtype)
        product.requires_grad_(False).train(layer.training)
        product.weight.copy_(matrix @ old.double())
        if bias:
            product.bias.copy_(matrix @ layer.bias.double())
        return product


def _with_layer(module: nn.Module, path: str, layer: nn.Module | nn.Parameter) -> nn.Module:
    """A copy with another layer at a path; modules outside of the path are shared."""
    step, _, rest = path.partition(".")
    view = shared_copy(module)
    setattr(view, step, _with_layer(getattr(module, step), rest, layer) if rest else layer)
    return view


def shared_copy(module: nn.Module, **attributes: Any) -> nn.Module:
    """A copy with some other attributes, which shares everything else.

    Unlike ``torch.func.functional_call`` this never changes the original, which other threads may be using.
    """
    view = copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        entries = getattr(module, registry)
        view.__dict__[registry] = {name: entries[name] for name in entries if name not in attributes}
    view.__dict__.update(attributes)
    return view
