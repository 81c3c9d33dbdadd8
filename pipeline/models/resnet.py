"""ResNets (He et al. 2016) whose parameters are named and shaped as torchvision's, so that its weights load.

The bottleneck has its stride in the 3x3 convolution, as torchvision (v1.5). A name that ends in d is
a ResNet-D (He et al. 2019, "Bag of tricks"): three 3x3 convolutions as the stem, and average pooling before the 1x1
convolution of a strided shortcut; parameters are named as timm's. A block's last norm starts at zero, so that it is the
identity at first (Goyal et al. 2017).
"""

import torch
from torch import nn
from torch.nn import functional as F

STEMS = ("imagenet", "small")
_NARROW = 16  # a convolution of fewer channels is not blurred: it reads the image, where blur costs detail


class Blur(nn.Module):
    """(1, 2, 1) x (1, 2, 1) / 16 over each channel by itself, zeros around (Zhang 2019); (n, channels, h, w) float."""

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(line, line).repeat(channels, 1, 1, 1)
        self.register_buffer("kernel", kernel, persistent=False)  # the state stays what torchvision's is
        self.channels, self.stride = channels, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.kernel, stride=self.stride, padding=1, groups=self.channels)


class BlurredConv2d(nn.Conv2d):
    """A strided convolution of a blurred map, as in ffcv-imagenet. To blur after a convolution of stride 1, as Zhang
    does, would be four times the work."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.blur = Blur(self.in_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.blur(x))


class DropPath(nn.Module):
    """In training, zeros instead of a sample's path at `rate`, and 1 / (1 - rate) of the others' (Huang et al. 2016).
    Draws one number a sample from torch's default generator of the device."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.rate:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.rate:.3g}"


def _conv(into: int, out: int, size: int, stride: int = 1, blurpool: bool = False) -> nn.Conv2d:
    kind = BlurredConv2d if blurpool and stride > 1 and into >= _NARROW else nn.Conv2d
    return kind(into, out, size, stride, padding=size // 2, bias=False)


def _shortcut(into: int, out: int, stride: int, deep: bool, blurpool: bool) -> nn.Module:
    if stride == 1 and into == out:
        return nn.Identity()
    if not deep:
        return nn.Sequential(_conv(into, out, 1, stride, blurpool), nn.BatchNorm2d(out))
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, _conv(into, out, 1), nn.BatchNorm2d(out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions of `width` beside a shortcut."""

    expansion = 1

    def __init__(self, into: int, width: int, stride: int, deep: bool, blurpool: bool, drop_path: float):
        super().__init__()
        self.conv1 = _conv(into, width, 3, stride, blurpool)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(into, width, stride, deep, blurpool)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        path = F.relu(self.bn1(self.conv1(x)), inplace=True)
        path = self.bn2(self.conv2(path))
        return F.relu(self.downsample(x) + self.drop_path(path), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions of `width`, `width` and four times `width` beside a shortcut."""

    expansion = 4

    def __init__(self, into: int, width: int, stride: int, deep: bool, blurpool: bool, drop_path: float):
        super().__init__()
        out = width * self.expansion
        self.conv1 = _conv(into, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride, blurpool)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out, 1)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(into, out, stride, deep, blurpool)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        path = F.relu(self.bn1(self.conv1(x)), inplace=True)
        path = F.relu(self.bn2(self.conv2(path)), inplace=True)
        path = self.bn3(self.conv3(path))
        return F.relu(self.downsample(x) + self.drop_path(path), inplace=True)


# name -> block, blocks of each of the four layers
_PLAIN = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
RESNETS = (*_PLAIN, *(f"{name}d" for name in _PLAIN))


class ResNet(nn.Module):
    """A network of RESNETS; see `resnet`."""

    def __init__(self, name: str, channels: int, classes: int, stem: str, blurpool: bool, drop_path: float):
        super().__init__()
        deep = name.endswith("d")
        block, depths = _PLAIN[name.removesuffix("d")]
        large = stem == "imagenet"
        first = 2 if large else 1
        if deep:
            self.conv1 = nn.Sequential(
                *(_conv(channels, 32, 3, first), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
                *(_conv(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
                _conv(32, 64, 3),
            )
        else:
            self.conv1 = _conv(channels, 64, 7 if large else 3, first)
        self.bn1 = nn.BatchNorm2d(64)
        if not large:
            self.maxpool = nn.Identity()
        elif blurpool:
            self.maxpool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), Blur(64, 2))
        else:
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        into, done, total = 64, 0, sum(depths)
        for layer, depth in enumerate(depths):
            blocks, width = [], 64 << layer
            for i in range(depth):
                done += 1
                stride = 2 if layer and not i else 1
                blocks.append(block(into, width, stride, deep, blurpool, drop_path * done / total))
                into = width * block.expansion
            setattr(self, f"layer{layer + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(into, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet(
    name: str,
    channels: int,
    image_size: int,
    classes: int,
    stem: str = "imagenet",
    blurpool: bool = False,
    drop_path: float = 0.0,
) -> ResNet:
    """A network of RESNETS. Input (n, channels, h, w) float of any size, output logits (n, classes).

    `stem` imagenet is a 7x7 convolution of stride 2 and max pooling: the last map has a 32nd of the image's side. small
    is a 3x3 of stride 1 and no pooling, an 8th, as is usual for images under 64 px (He et al. 2016, 4.2). `blurpool`
    blurs what is strided (Zhang 2019). `drop_path` leaves out the last block of this share of samples, and the l-th of
    L of l / L of it (Huang et al. 2016). Raises ValueError for what is not there, and for an `image_size` whose last
    map would be less than a pixel.
    """
    if name not in RESNETS:
        raise ValueError(f"no {name!r}: use one of {', '.join(RESNETS)}")
    if stem not in STEMS:
        raise ValueError(f"--stem {stem}: use imagenet, or small for images under 64 px")
    if not 0 <= drop_path < 1:
        raise ValueError(f"--drop-path {drop_path} must be in [0, 1)")
    least = 32 if stem == "imagenet" else 8
    if image_size < least:
        hint = ", or --stem small" if image_size >= 8 else ""
        raise ValueError(
            f"images of {image_size} px are less than a pixel of {name}'s last map: use --image-size {least} or more"
            + hint
        )
    return ResNet(name, channels, classes, stem, blurpool, drop_path)
