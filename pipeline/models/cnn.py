"""The small convolutional classifier of the PyTorch/Ray tutorials: three 3x3 convolutions, two dense layers."""

import torch
from torch import nn


class CNN(nn.Module):
    """3x3 convolutions of `widths` channels, each with ReLU and 2x2 max-pooling; flatten; dense `hidden`; classifier.

    Input (n, channels, image_size, image_size) float32, output logits (n, classes). `padding` 0 shrinks every
    convolution's map by 2, as the tutorial does (28 -> 1 after three); 1 keeps the size and about 2 points of
    Fashion-MNIST accuracy. Raises ValueError if the image is too small to survive the poolings.
    """

    def __init__(
        self, channels: int, image_size: int, classes: int, padding: int = 1, hidden: int = 128, widths=(32, 64, 128)
    ):
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"padding {padding}: use 0 (the tutorial's) or 1 (same size)")
        layers, width, size = [], channels, image_size
        for out in widths:
            layers += [nn.Conv2d(width, out, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
            width, size = out, (size - 2 + 2 * padding) // 2
        if size < 1:
            least = 8 if padding else 22
            raise ValueError(
                f"images of {image_size} px vanish in {len(widths)} poolings with padding {padding}: "
                f"use --image-size {least} or more" + ("" if padding else ", or --padding 1")
            )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(width * size * size, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))
