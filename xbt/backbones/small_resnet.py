"""A residual network for small images that a CPU can train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

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
        channels = [width * each for each in CHANNELS]
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(inplace=True),
        )
        blocks, before = [], channels[0]
        for number, each in enumerate(channels):
            blocks.append(_block(before, each, stride=1 if number == 0 else 2))
            before = each
        self.stages = nn.Sequential(*blocks)
        self.feature_dim = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, height, width) pixels → (n, feature_dim) pooled features."""
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
