import hashlib

import pytest
import torch
from torch import nn

from pipeline.models import classifier
from pipeline.models.resnet import BasicBlock, Blur, Bottleneck, DropPath, resnet
from pipeline.models.resnet9 import ResNet9

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
# SHA-256 of the sorted lines "name shape" of torchvision 0.28.0's and, with the d, timm 1.0.31's state dicts
STATES = {
    "resnet18": "5191d63ec398959223d67ef37376f9061e6965b859fc2d4e40e23d037147a0d7",
    "resnet50": "a87e91cd6bd1f939e0b723852e567a7205d33b0ac984ac02dd1a5f225d37c036",
    "resnet18d": "a22e8f375ccdad071e02907f1014fb7accf2985806c74b6290cef30e57900e21",
    "resnet50d": "26ed29dda64d7db97cae607fcf98b7c3007f831e48f1d92c96273af092811a3b",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def count(module):
    return sum(p.numel() for p in module.parameters())


def state(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def shapes_only(name, channels=3, size=224, classes=1000, **options):
    with torch.device("meta"):
        return resnet(name, channels, size, classes, **options)


def lively(module, seed=0):
    """The module with paths that are not zero, as they all are at first."""
    generator = torch.Generator().manual_seed(seed)
    for inner in module.modules():
        if isinstance(inner, nn.BatchNorm2d):
            inner.weight.data.uniform_(0.5, 1, generator=generator)
            inner.running_mean.normal_(0, 0.1, generator=generator)
    return module


def made(name, *args, seed=0, **options):
    torch.manual_seed(seed)
    return lively(resnet(name, *args, **options))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet50d", 25_576_264),
    ],
)
def test_resnets_have_the_published_number_of_parameters_and_last_map(name, parameters):
    model, maps = shapes_only(name), []
    model.layer4.register_forward_hook(lambda _module, _given, map_: maps.append(tuple(map_.shape)))
    assert count(model) == parameters
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert maps == [(2, model.fc.in_features, 7, 7)]
    assert model.fc.in_features == (512 if name in ("resnet18", "resnet34") else 2048)


def torchvisions(name):
    """{name: shape} by the rule of torchvision's names."""
    found = {}

    def conv(at, out, into, size):
        found[f"{at}.weight"] = (out, into, size, size)

    def norm(at, width):
        found.update({f"{at}.{what}": (width,) for what in ("weight", "bias", "running_mean", "running_var")})
        found[f"{at}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7), norm("bn1", 64)
    wide, into = name in ("resnet50", "resnet101"), 64
    for layer, blocks in enumerate(BLOCKS[name]):
        width = 64 * 2**layer
        out = 4 * width if wide else width
        for block in range(blocks):
            at = f"layer{layer + 1}.{block}"
            sizes = [(width, into, 1), (width, width, 3), (out, width, 1)] if wide else [(out, into, 3), (out, out, 3)]
            for i, shape in enumerate(sizes):
                conv(f"{at}.conv{i + 1}", *shape), norm(f"{at}.bn{i + 1}", shape[0])
            if block == 0 and into != out:
                conv(f"{at}.downsample.0", out, into, 1), norm(f"{at}.downsample.1", out)
            into = out
    return found | {"fc.weight": (1000, into), "fc.bias": (1000,)}


@pytest.mark.parametrize("name", BLOCKS)
def test_names_and_shapes_are_torchvisions(name):
    assert state(shapes_only(name)) == torchvisions(name)


@pytest.mark.parametrize("name", STATES)
def test_names_and_shapes_are_those_of_the_very_state_dicts_of_torchvision_and_timm(name):
    lines = sorted(f"{key} {shape}" for key, shape in state(shapes_only(name)).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == STATES[name]


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    strided = {n for n, m in shapes_only("resnet50").named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    assert strided == {"conv1"} | {f"layer{i}.0.{conv}" for i in (2, 3, 4) for conv in ("conv2", "downsample.0")}


def test_a_d_network_halves_in_its_shortcuts_by_averaging():
    model = shapes_only("resnet50d")
    strided = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    assert strided == {"conv1.0", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"}
    assert [n for n, m in model.named_modules() if isinstance(m, nn.AvgPool2d)] == [
        f"layer{i}.0.downsample.0" for i in (2, 3, 4)
    ]


@pytest.mark.parametrize(("kind", "channels"), [(BasicBlock, 8), (Bottleneck, 32)])
def test_a_new_block_is_the_identity(kind, channels):
    block = kind(channels, 8, stride=1, deep=False, blurpool=False, drop_path=0.0)
    x = torch.rand(2, channels, 5, 5)
    assert torch.equal(block(x), x)
    assert not torch.equal(lively(block)(x), x)


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "resnet50"])
@pytest.mark.parametrize(("channels", "size", "stem"), [(1, 32, "imagenet"), (3, 75, "imagenet"), (1, 28, "small")])
@pytest.mark.parametrize("blurpool", [False, True])
def test_every_parameter_learns_from_grey_and_odd_sized_images_too(name, channels, size, stem, blurpool):
    model = made(name, channels, size, 7, stem=stem, blurpool=blurpool, drop_path=0.1)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "convolutions"), [("resnet18", 1), ("resnet18d", 3)])
def test_the_small_stem_keeps_the_side_of_small_images(name, convolutions):
    model, maps = shapes_only(name, size=32, stem="small"), []
    model.layer1.register_forward_hook(lambda _module, given, _map: maps.append(tuple(given[0].shape)))
    model.layer4.register_forward_hook(lambda _module, _given, map_: maps.append(tuple(map_.shape)))
    model(torch.empty(2, 3, 32, 32, device="meta"))
    assert maps == [(2, 64, 32, 32), (2, 512, 4, 4)]
    stem = [m for m in model.conv1.modules() if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in stem] == [(3, 3)] * convolutions


@pytest.mark.parametrize(
    ("name", "stem", "blurs"),
    # max pooling, and in each of three layers the block's and the shortcut's convolution; a d shortcut averages
    [("resnet18", "imagenet", 7), ("resnet50", "imagenet", 7), ("resnet50d", "imagenet", 4), ("resnet18", "small", 6)],
)
def test_blurpool_blurs_all_that_is_strided_but_the_images_and_changes_no_name(name, stem, blurs):
    plain, blurred = shapes_only(name, stem=stem), shapes_only(name, stem=stem, blurpool=True)
    assert state(blurred) == state(plain)
    assert sum(isinstance(m, Blur) for m in blurred.modules()) == blurs
    images = torch.empty(1, 3, 225, 225, device="meta")
    for layer in ("maxpool", "layer2", "layer4"):
        shapes = []
        for model in (plain, blurred):
            getattr(model, layer).register_forward_hook(lambda _m, _g, map_, to=shapes: to.append(map_.shape))
            model(images)
        assert shapes[0] == shapes[1]


def test_blur_is_the_binomial_filter_of_each_channel_alone():
    image = torch.zeros(1, 2, 5, 5)
    image[0, 0, 2, 2], image[0, 1] = 16, 3
    blurred = Blur(2)(image)
    assert torch.equal(blurred[0, 0, 1:4, 1:4], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]))
    assert torch.equal(blurred[0, 1, 1:4, 1:4], torch.full((3, 3), 3.0))
    assert torch.equal(Blur(2, stride=2)(image), blurred[:, :, ::2, ::2])


def test_blurpool_makes_a_shift_by_a_pixel_matter_less():
    torch.manual_seed(1)
    images = nn.functional.interpolate(torch.randn(8, 3, 12, 12), size=(72, 72), mode="bilinear")
    changes = []
    for blurpool in (False, True):
        model = made("resnet18", 3, 64, 10, blurpool=blurpool).eval()
        with torch.no_grad():
            here, there = model(images[:, :, 4:-4, 4:-4]), model(images[:, :, 4:-4, 5:-3])
        changes.append(float((here - there).norm() / (here - here.mean(0)).norm()))
    assert changes[1] < 0.6 * changes[0]  # 0.2 to 0.35 of it with other seeds


def test_drop_path_keeps_or_zeroes_whole_samples_and_their_expectation():
    torch.manual_seed(0)
    out = DropPath(0.2)(torch.ones(20_000, 2, 3, 3))
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))
    assert abs(float(out.mean()) - 1) < 0.015  # 4 standard errors


@pytest.mark.parametrize("name", ["resnet18", "resnet50d"])
def test_the_rate_of_drop_path_grows_by_as_much_a_block_to_what_is_asked(name):
    rates = [m.rate for m in shapes_only(name, drop_path=0.2).modules() if isinstance(m, DropPath)]
    total = sum(BLOCKS[name.removesuffix("d")])
    assert rates == pytest.approx([0.2 * i / total for i in range(1, total + 1)])


def test_drop_path_follows_torchs_seed_and_ends_with_training():
    plain, dropping = (made("resnet18", 1, 32, 5, stem="small", drop_path=rate) for rate in (0.0, 0.5))
    images = torch.randn(8, 1, 32, 32)

    def trained(seed):
        torch.manual_seed(seed)
        return dropping(images)

    with torch.no_grad():
        assert torch.equal(plain.eval()(images), dropping.eval()(images))
        plain.train(), dropping.train()
        first = trained(1)
        assert torch.equal(first, trained(1))
        assert not torch.equal(first, trained(2))
        assert not torch.equal(first, plain(images))


@pytest.mark.parametrize("make", ["resnet18", "resnet18d", "resnet9"])
def test_memory_layout_and_autocast_change_no_more_than_rounding(make):
    torch.manual_seed(0)
    options = {"width": 16} if make == "resnet9" else {"blurpool": True, "drop_path": 0.1}
    model = lively(classifier(make, 3, 64, 5, **options))
    images = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        plain = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(images).float() - plain).norm() < 0.05 * plain.norm()
        model.to(memory_format=torch.channels_last)
        assert torch.allclose(model(images.to(memory_format=torch.channels_last)), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image_size": 28}, "images of 28 px .*--image-size 32 or more, or --stem small"),
        ({"image_size": 7}, "images of 7 px .*--image-size 32 or more$"),
        ({"image_size": 7, "stem": "small"}, "images of 7 px .*--image-size 8 or more$"),
        ({"stem": "tiny"}, "--stem tiny: use imagenet, or small"),
        ({"drop_path": 1.0}, r"--drop-path 1.0 must be in \[0, 1\)"),
        ({"drop_path": -0.1}, "--drop-path -0.1"),
        ({"name": "resnet19"}, "'resnet19': use one of resnet18, "),
    ],
)
def test_a_resnet_that_cannot_be_is_refused_with_what_can(wrong, said):
    options = {"name": "resnet18", "channels": 3, "image_size": 64, "classes": 5} | wrong
    with pytest.raises(ValueError, match=said):
        resnet(**options)


def test_resnet9_has_pages_number_of_parameters_and_under_a_million_at_width_24():
    assert count(ResNet9(3, 32, 10)) == 6_573_120
    assert count(ResNet9(1, 28, 10, width=24)) == 926_568
    assert [name for name, _ in ResNet9(1, 28, 10, width=2).named_parameters()][-1] == "head.weight"


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 9), (1, 28), (3, 32), (1, 47)])
def test_resnet9_takes_any_image_from_8_px(channels, size):
    model = ResNet9(channels, size, 7, width=8)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_resnet9_of_tiny_images_or_of_no_width_is_refused():
    with pytest.raises(ValueError, match=r"images of 7 px .*--image-size 8"):
        ResNet9(1, 7, 10)
    with pytest.raises(ValueError, match="--width -1"):
        ResNet9(1, 28, 10, width=-1)
