"""A small class-conditional GAN in DCGAN's shape (Radford et al. 2016), without batch norm and without custom kernels.

The class enters the generator as an embedding added to the latent, and the discriminator by projection (Miyato and
Koyama 2018): the embedding's inner product with the features is added to the score. With `classes` 0 both are plain.
"""

import torch
from torch import nn


class Generator(nn.Module):
    """(n, latent) float and labels (n,) int64 -> images (n, channels, image_size, image_size) in (-1, 1)."""

    def __init__(self, channels: int, image_size: int, classes: int, latent: int = 100, width: int = 32):
        super().__init__()
        self.latent, self.image_size, self.width = latent, image_size, width
        # Doublings from a 4..8 px start; sizes that do not halve evenly are made a little larger and cropped.
        self.doublings = max(1, (image_size - 1).bit_length() - 3)
        self.start = -(-image_size // 2**self.doublings)
        self.embed = nn.Embedding(classes, latent) if classes else None
        wide = width * 2**self.doublings
        self.dense = nn.Linear(latent, wide * self.start**2)
        self.norms = nn.ModuleList([nn.GroupNorm(8, wide >> i) for i in range(self.doublings)])
        self.blocks = nn.ModuleList(
            [nn.Conv2d(wide >> i, wide >> (i + 1), 3, padding=1) for i in range(self.doublings)]
        )
        self.to_image = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            z = z + self.embed(labels)
        x = self.dense(z).unflatten(1, (-1, self.start, self.start))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = block(nn.functional.interpolate(torch.relu(norm(x)), scale_factor=2))
        side = self.image_size
        return torch.tanh(self.to_image(torch.relu(x)))[:, :, :side, :side]


class Discriminator(nn.Module):
    """Images (n, channels, image_size, image_size) in (-1, 1) and labels (n,) -> realness scores (n,)."""

    def __init__(self, channels: int, image_size: int, classes: int, width: int = 32):
        super().__init__()
        halvings = max(1, (image_size - 1).bit_length() - 3)
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for i in range(halvings):
            layers += [nn.Conv2d(width << i, width << (i + 1), 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        side = image_size >> halvings
        features = (width << halvings) * side * side
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 128), nn.LeakyReLU(0.2))
        self.score = nn.Linear(128, 1)
        self.embed = nn.Embedding(classes, 128) if classes else None

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        features = self.features(images)
        score = self.score(features).squeeze(1)
        if self.embed is not None:
            score = score + (self.embed(labels) * features).sum(1)
        return score


def conditional_gan(
    channels: int, image_size: int, classes: int, latent: int = 100, width: int = 32
) -> tuple[Generator, Discriminator]:
    """A generator and its discriminator. Raises ValueError for images under 8 px."""
    if image_size < 8:
        raise ValueError(f"a GAN of {image_size} px images: use --image-size 8 or more")
    return (
        Generator(channels, image_size, classes, latent, width),
        Discriminator(channels, image_size, classes, width),
    )
