"""Multiplying a matrix into the last layer of each tower, so that mapping vectors costs nothing.

A tower ends in z ∝ P x. The vectors of a linear map W of them are normalise(W z) = normalise((W P) x), so
that replacing P by W P gives them without another step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xbt.errors import EncoderError


def fold_layers(module: nn.Module, layers: Mapping[str, str], weight: Tensor, name: str) -> nn.Module:
    """A module that shares all its weights with another one, but for its last layers.

    Args:
        module: The model, which is not changed.
        layers: Per tower, the path of an ``nn.Linear``, or of an (in, dim) parameter that rows are
            multiplied with.
        weight: (out_dim, dim) matrix to multiply each of them with.
        name: What to call the model in errors.

    Raises:
        EncoderError: If one of the layers is anything else.
    """
    folded = module
    for tower, path in layers.items():
        layer = _at(module, path)
        if type(layer) is not nn.Linear and not (isinstance(layer, nn.Parameter) and layer.ndim == 2):
            what = "nothing" if layer is None else f"a {type(layer).__name__}"
            raise EncoderError(
                f"the {tower} tower of {name} ends in {what} at {path}, not in a matrix, so the projection "
                "cannot be folded into it; use it unfolded"
            )
        folded = _with_layer(folded, path, _composed(layer, weight))
    return folded


def has_path(module: nn.Module, path: str) -> bool:
    """Whether a module has something at a dotted path."""
    return _at(module, path) is not None


def _at(module: Any, path: str) -> Any:
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
        made = nn.Linear(layer.in_features, len(weight), bias, device=old.device, dtype=old.dtype)
        made.requires_grad_(False).train(layer.training)
        made.weight.copy_(matrix @ old.double())
        if bias:
            made.bias.copy_(matrix @ layer.bias.double())
        return made


def _with_layer(module: nn.Module, path: str, layer: nn.Module | nn.Parameter) -> nn.Module:
    """A shallow copy along the path; everything beside it is shared."""
    step, _, rest = path.partition(".")
    view = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        view.__dict__[registry] = dict(getattr(module, registry))
    setattr(view, step, _with_layer(getattr(module, step), rest, layer) if rest else layer)
    return view
