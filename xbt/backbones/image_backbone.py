"""A network that turns pixels into pooled features, whichever library it comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xbt.backbones.preprocessing import ImagePreprocessing
from xbt.errors import ConfigError


class ImageBackbone(nn.Module):
    """(n, 3, height, width) pixels → (n, feature_dim) pooled features, not normalised.

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
        """Finds out the dimension by a pass over one blank image.

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
        """(n, 3, height, width) pixels → (n, feature_dim) features."""
        # Convolutions are a fifth faster on a CPU when the channels of a pixel lie together.
        features: Tensor = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return features

    def description(self) -> dict[str, Any]:
        """A JSON-able form, of which :func:`xbt.backbones.rebuild_backbone` makes the same network."""
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
