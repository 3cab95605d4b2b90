"""One specification string, one backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from xbt.backbones.image_backbone import ImageBackbone
from xbt.backbones.preprocessing import ImagePreprocessing
from xbt.backbones.small_resnet import SmallResNet
from xbt.errors import ConfigError, EncoderError

FORMS = (
    "small_resnet (or small_resnet:WIDTH)",
    "timm:NAME",
    "torchvision:NAME",
    "clip:ENCODER (any specification of load_encoder)",
)
"""Every form a specification can take."""
SMALL_SIZE = 32
USUAL_SIZE = 224


def load_backbone(spec: str, image_size: int | None = None, pretrained: bool = False) -> ImageBackbone:
    """Builds an image backbone without its classifier, ready to be trained.

    Random weights come from torch's global generator: seed it beforehand.

    Args:
        spec: ``"small_resnet"`` (for 32×32 pixels; ``"small_resnet:2"`` is twice as wide), ``"timm:NAME"``,
            ``"torchvision:NAME"``, or ``"clip:ENCODER"`` for the image tower of a CLIP, with its weights.
        image_size: Side in pixels of the images; by default the architecture's own.
        pretrained: Whether timm or torchvision download the weights that go with the name.

    Returns:
        The backbone on the CPU, in training mode, all of its weights trainable.

    Raises:
        ConfigError: If the specification is malformed or names no such network, the network does not give
            one vector per image or cannot take images of that size, or has no pretrained weights.
        EncoderError: If the CLIP cannot be loaded.

    Example:
        >>> load_backbone("timm:resnet18").feature_dim
        512
    """
    kind, _, name = spec.partition(":")
    if kind == "small_resnet" and not pretrained:
        backbone = _load_small_resnet(spec, name, image_size)
    elif kind in _LIBRARIES and name:
        network, size, preprocessing = _LIBRARIES[kind](name, image_size, pretrained)
        backbone = ImageBackbone(spec, network, size, preprocessing)
    elif kind == "clip" and name:
        backbone = _load_clip(spec, name, image_size)
    elif kind == "small_resnet":
        raise ConfigError("pretrained is set, but there are no weights of small_resnet; leave it out")
    else:
        raise ConfigError(f"{spec!r} is not a backbone; write one of: {'; '.join(FORMS)}")
    return backbone.requires_grad_(True).train()


def rebuild_backbone(description: Mapping[str, Any]) -> ImageBackbone:
    """Builds the network that :meth:`ImageBackbone.description` tells of; nothing is downloaded.

    Returns:
        The same architecture with random weights.

    Raises:
        ConfigError: As :func:`load_backbone`.
        EncoderError: If a CLIP's image tower cannot be built.
        KeyError: If a key is missing.
    """
    spec, size, architecture = (description[key] for key in ("spec", "image_size", "architecture"))
    if architecture is None:
        if str(spec).startswith("clip:"):
            raise EncoderError(f"'{spec}' was saved without its architecture; save it again")
        return load_backbone(str(spec), int(size))
    from xbt.encoders.image_tower import build_image_tower

    return ImageBackbone(str(spec), build_image_tower(architecture), int(size), None, architecture)


def _load_small_resnet(spec: str, width: str, image_size: int | None) -> ImageBackbone:
    if spec != "small_resnet" and not (width.isdecimal() and int(width)):
        raise ConfigError(f"{spec!r}: the width must be a whole number of at least 1, as in small_resnet:2")
    return ImageBackbone(spec, SmallResNet(int(width or 1)), image_size or SMALL_SIZE)


def _load_clip(spec: str, name: str, image_size: int | None) -> ImageBackbone:
    from xbt.encoders import load_encoder
    from xbt.encoders.image_tower import take_image_tower

    encoder = load_encoder(name)
    tower = take_image_tower(encoder)
    if image_size not in (None, tower.image_size):
        raise ConfigError(
            f"image_size is {image_size}, but '{name}' takes {tower.image_size} pixels; leave it out"
        )
    how = encoder.preprocessing
    kept = ("mean", "std", "interpolation", "resize_mode")
    preprocessing = ImagePreprocessing(tower.image_size, *(how[key] for key in kept))
    return ImageBackbone(spec, tower, tower.image_size, preprocessing, tower.architecture)


def _load_timm(
    name: str, image_size: int | None, pretrained: bool
) -> tuple[nn.Module, int, ImagePreprocessing | None]:
    import timm  # takes a second

    if not timm.is_model(name):
        raise ConfigError(f"timm knows no model {name!r}; look at timm.list_models()")
    if pretrained and not timm.models.is_model_pretrained(name):
        raise ConfigError(f"timm has no pretrained weights of {name!r}; leave pretrained out")
    network = _sized(
        lambda **size: timm.create_model(name, pretrained=pretrained, num_classes=0, **size),
        "img_size",
        image_size,
    )
    own: dict[str, Any] = dict(network.pretrained_cfg)
    size = image_size or int(own["input_size"][-1])
    if not pretrained:
        return network, size, None
    kept = {key: own[key] for key in ("mean", "std", "interpolation")}
    return network, size, ImagePreprocessing(size, **kept, crop_fraction=float(own["crop_pct"]))


def _load_torchvision(
    name: str, image_size: int | None, pretrained: bool
) -> tuple[nn.Module, int, ImagePreprocessing | None]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(f"torchvision knows no image classifier {name!r}; look at models.list_models()")
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    network = _sized(lambda **size: models.get_model(name, weights=weights, **size), "image_size", image_size)
    _cut_classifier(network, name)
    if weights is None:
        return network, image_size or USUAL_SIZE, None
    how = weights.transforms()
    size = image_size or int(how.crop_size[0])
    fraction = min(1.0, how.crop_size[0] / how.resize_size[0])
    interpolation = how.interpolation.value
    return network, size, ImagePreprocessing(size, how.mean, how.std, interpolation, crop_fraction=fraction)


_LIBRARIES: dict[str, Callable[[str, int | None, bool], tuple[nn.Module, int, ImagePreprocessing | None]]] = {
    "timm": _load_timm,
    "torchvision": _load_torchvision,
}


def _sized(create: Callable[..., nn.Module], option: str, image_size: int | None) -> Any:
    """A network told the size of its images where it wants to know; convolutional ones do not."""
    if image_size is not None:
        try:
            return create(**{option: image_size})
        except TypeError:  # no such option
            pass
    return create()


def _cut_classifier(network: nn.Module, name: str) -> None:
    """Replaces the last linear layer, which torchvision's models keep under a dozen names, by nothing."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"torchvision's {name!r} does not end in a linear layer; choose another network")
    parent, _, last = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
