"""Backbones from specification strings, and a small residual network that a CPU can train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from xbt.backbones.preprocessing import ImagePreprocessing
from xbt.errors import ConfigError, EncoderError


class ImageBackbone(nn.Module):
    """Network from (n, 3, height, width) pixels to (n, feature_dim) pooled features, not normalised.

    Attributes:
        spec: The specification it was loaded from, such as ``"timm:resnet18"``.
        network: The network itself.
        image_size: Side in pixels of the images it is meant for.
        feature_dim: Dimension of its features.
        preprocessing: What its pretrained weights expect; ``None`` without such weights.
        architecture: JSON-able description that rebuilds a CLIP's image tower without its files; ``None`` for
            other networks, of which the specification says all.
    """

    def __init__(
        self,
        spec: str,
        network: nn.Module,
        image_size: int,
        preprocessing: ImagePreprocessing | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        """Determine the dimension with a forward pass of one blank image.

        Raises:
            ConfigError: If the network does not give one vector per image.
        """
        super().__init__()
        self.spec = spec
        self.network = network
        self.image_size = image_size
        self.preprocessing = preprocessing
        self.architecture = architecture
        self.feature_dim = _feature_dim(spec, network, image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (n, 3, height, width) pixels to (n, feature_dim) features."""
        # Convolutions are a fifth faster on a CPU when the channels of a pixel lie together.
        features: Tensor = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return features

    def description(self) -> dict[str, Any]:
        """A JSON-able form, from which :func:`xbt.backbones.rebuild_backbone` builds the same network."""
        return {"spec": self.spec, "image_size": self.image_size, "architecture": self.architecture}

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"ImageBackbone('{self.spec}', feature_dim={self.feature_dim}, {count:,} weights)"


def _feature_dim(spec: str, network: nn.Module, image_size: int) -> int:
    was_training = network.training
    network.eval()  # a pass in training mode would move the batch norms' statistics
    try:
        with torch.no_grad():
            features = network(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # networks check their input by assertions, views and convolutions alike
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"'{spec}' cannot take images of {image_size} x {image_size} pixels ({type(error).__name__}: "
            f"{reason}); choose another image_size"
        ) from error
    finally:
        network.train(was_training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(
            f"'{spec}' gives {got} for one image, not one vector; choose a classifier's network"
        )
    return int(features.shape[1])


CHANNELS = (32, 64, 128)
"""Channels of the three stages at width 1."""


class SmallResNet(nn.Module):
    """Three stages of one basic block each, for images of about 32×32 pixels; 0.3 million weights.

    After He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2, but the first
    convolution halves the image, and channels make up for it: the work is a third of their ResNet-20's.

    Args:
        width: Factor on the channels of every stage.

    Attributes:
        feature_dim: Dimension of the pooled features.
    """

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        channels = [width * factor for factor in CHANNELS]
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(inplace=True),
        )
        blocks, before = [], channels[0]
        for number, width_out in enumerate(channels):
            blocks.append(_block(before, width_out, stride=1 if number == 0 else 2))
            before = width_out
        self.stages = nn.Sequential(*blocks)
        self.feature_dim = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (n, 3, height, width) pixels to (n, feature_dim) pooled features."""
        features: Tensor = torch.mean(self.stages(self.stem(pixels)), dim=(2, 3))
        return features


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
        )
    block: nn.Module = BasicBlock(channels_in, channels_out, stride, shortcut)
    return block


FORMS = (
    "small_resnet (or small_resnet:WIDTH)",
    "timm:NAME",
    "torchvision:NAME",
    "clip:ENCODER (any specification of load_encoder)",
)
"""All forms of a specification."""
SMALL_SIZE = 32
USUAL_SIZE = 224


def load_backbone(spec: str, image_size: int | None = None, pretrained: bool = False) -> ImageBackbone:
    """Build an image backbone without its classifier, for training.

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
        if spec != kind and not (name.isdecimal() and int(name)):
            raise ConfigError(
                f"{spec!r}: the width must be a whole number of at least 1, as in small_resnet:2"
            )
        backbone = ImageBackbone(spec, SmallResNet(int(name or 1)), image_size or SMALL_SIZE)
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
    """Build the network of an :meth:`ImageBackbone.description`; nothing is downloaded.

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
    defaults: dict[str, Any] = dict(network.pretrained_cfg)
    size = image_size or int(defaults["input_size"][-1])
    if not pretrained:
        return network, size, None
    kept = {key: defaults[key] for key in ("mean", "std", "interpolation")}
    return network, size, ImagePreprocessing(size, **kept, crop_fraction=float(defaults["crop_pct"]))


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
    """Create a network; pass the image size if it has this option, as transformers do."""
    if image_size is not None:
        try:
            return create(**{option: image_size})
        except TypeError:  # no such option
            pass
    return create()


def _cut_classifier(network: nn.Module, name: str) -> None:
    """Replace the last linear layer by an identity; torchvision has a dozen names for it."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"torchvision's {name!r} does not end in a linear layer; choose another network")
    parent, _, last = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
