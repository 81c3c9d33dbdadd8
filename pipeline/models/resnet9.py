"""The ResNet-9 of DAWNBench (Page 2018, "How to train your ResNet"), for images of about 32 px."""

import torch
from torch import nn


def _conv(into: int, out: int) -> nn.Sequential:
    # CELU, which Page came to in the last part: smooth, and 0.3 keeps it near the ReLU of the first
    return nn.Sequential(
        nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.CELU(0.3, inplace=True)
    )


class Residual(nn.Module):
    """Two convolutions, and what they were given; (n, width, h, w) float."""

    def __init__(self, width: int):
        super().__init__()
        self.path = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.path(x)


class ResNet9(nn.Module):
    """Eight 3x3 convolutions of `width` to 8 times `width` channels, three 2x2 max-poolings, and a linear head.

    Input (n, channels, h, w) float of any size from 8 px, output logits (n, classes). Width 64 is Page's network of 6.6
    million parameters; 24 has 0.93 million. As in his, the head has no bias and its logits are scaled by an eighth,
    which is an eighth of their temperature at the start. What the poolings leave is reduced to its greatest value.
    Raises ValueError if they leave nothing.
    """

    def __init__(self, channels: int, image_size: int, classes: int, width: int = 64):
        super().__init__()
        if width < 1:
            raise ValueError(f"--width {width} must be at least 1")
        if image_size < 8:
            raise ValueError(f"images of {image_size} px vanish in resnet9's 3 poolings: use --image-size 8 or more")
        self.features = nn.Sequential(
            _conv(channels, width),
            *(_conv(width, 2 * width), nn.MaxPool2d(2), Residual(2 * width)),
            *(_conv(2 * width, 4 * width), nn.MaxPool2d(2)),
            *(_conv(4 * width, 8 * width), nn.MaxPool2d(2), Residual(8 * width)),
        )
        self.head = nn.Linear(8 * width, classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).amax((2, 3))) / 8
