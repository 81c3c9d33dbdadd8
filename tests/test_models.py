import sys
import types

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.models import CLASSIFIERS, GANS, classifier
from pipeline.models.cnn import CNN
from pipeline.models.resnet import RESNETS, Blur
from pipeline.models.resnet9 import ResNet9

pytestmark = pytest.mark.usefixtures("one_thread")


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("channels", "size", "padding"),
    [(1, 28, 0), (1, 28, 1), (1, 32, 0), (3, 32, 1), (3, 224, 1), (3, 22, 0), (1, 8, 1)],
)
def test_the_cnn_maps_images_to_a_logit_a_class(channels, size, padding):
    model = CNN(channels, size, 7, padding)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_tutorials_network_has_its_number_of_parameters():
    convolutions = (9 * 1 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    assert count(CNN(1, 28, 10, padding=0)) == convolutions + (128 + 1) * 128 + (128 + 1) * 10 == 110_474
    assert count(CNN(1, 28, 10, padding=1)) == convolutions + (9 * 128 + 1) * 128 + (128 + 1) * 10 == 241_546


@pytest.mark.parametrize(("size", "padding", "least"), [(21, 0, 22), (7, 1, 8), (1, 1, 8)])
def test_an_image_too_small_for_the_poolings_is_refused_with_the_least_that_works(size, padding, least):
    with pytest.raises(ValueError, match=f"images of {size} px.*--image-size {least}"):
        CNN(1, size, 10, padding)
    CNN(1, least, 10, padding)(torch.randn(1, 1, least, least))


def test_another_padding_is_refused():
    with pytest.raises(ValueError, match="padding 2"):
        CNN(1, 28, 10, padding=2)


@pytest.mark.parametrize("size", [8, 9, 15, 16, 28, 32, 33, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [0, 5])
def test_a_gans_networks_fit_together_at_any_size(size, channels, classes):
    generator, discriminator = GANS["dcgan"](channels=channels, image_size=size, classes=classes, latent=10, width=4)
    labels = torch.arange(6) % max(1, classes)
    images = generator(torch.randn(6, 10), labels)
    assert images.shape == (6, channels, size, size)
    assert images.abs().max() <= 1
    scores = discriminator(images, labels)
    assert scores.shape == (6,)
    scores.sum().backward()
    used = [
        p.grad is not None and bool(p.grad.isfinite().all()) for m in (generator, discriminator) for p in m.parameters()
    ]
    assert all(used)


def test_the_class_changes_image_and_score_where_there_are_classes_and_only_there():
    for classes, changes in ((5, True), (0, False)):
        torch.manual_seed(0)
        generator, discriminator = GANS["dcgan"](channels=1, image_size=16, classes=classes, latent=10, width=4)
        z, one, two = torch.randn(2, 10), torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
        images = generator(z, one)
        assert torch.equal(images, generator(z, two)) != changes
        assert torch.equal(discriminator(images, one), discriminator(images, two)) != changes


def test_no_sample_of_a_batch_sees_another():
    torch.manual_seed(0)
    generator, discriminator = GANS["dcgan"](channels=1, image_size=16, classes=3, latent=10, width=4)
    z, labels = torch.randn(6, 10), torch.arange(6) % 3
    images = generator(z, labels)
    assert torch.allclose(images[2:4], generator(z[2:4], labels[2:4]), atol=1e-5)
    assert torch.allclose(discriminator(images, labels)[:1], discriminator(images[:1], labels[:1]), atol=1e-5)


def test_a_gan_of_tiny_images_is_refused():
    with pytest.raises(ValueError, match="7 px"):
        GANS["dcgan"](channels=1, image_size=7, classes=0)


def test_the_tables_name_what_there_is():
    plain = {"resnet18", "resnet34", "resnet50", "resnet101"}
    assert set(CLASSIFIERS) == {"cnn", "resnet9"} | plain | {f"{name}d" for name in plain}
    assert set(GANS) == {"dcgan"}


DEFAULTS = {"padding": 1, "width": 0, "stem": "imagenet", "blurpool": False, "drop_path": 0.0}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_of_the_table_is_made_by_name_with_the_options_as_they_are(name):
    with torch.device("meta"):
        model = classifier(name, 1, 32, 6, **DEFAULTS)
    assert model(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 6)


def test_an_option_reaches_the_model_that_has_it():
    assert classifier("cnn", 1, 28, 10, **DEFAULTS | {"padding": 0}).features[0].padding == (0, 0)
    assert classifier("resnet9", 1, 28, 10, **DEFAULTS | {"width": 8}).head.in_features == 64
    all_three = {"stem": "small", "blurpool": True, "drop_path": 0.2}
    model = classifier("resnet18", 1, 28, 10, **DEFAULTS | all_three)
    assert model.conv1.kernel_size == (3, 3)
    assert sum(isinstance(m, Blur) for m in model.modules()) == 6
    assert model.layer4[-1].drop_path.rate == 0.2


RESIDUAL = ", ".join(RESNETS)


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("cnn", {"blurpool": True}, f"--blurpool: cnn has none; {RESIDUAL} do"),
        ("cnn", {"drop_path": 0.1}, f"--drop-path 0.1: cnn has none; {RESIDUAL}, timm:NAME do"),
        ("resnet9", {"stem": "small"}, f"--stem small: resnet9 has none; {RESIDUAL} do"),
        ("resnet50", {"width": 24}, "--width 24: resnet50 has none; resnet9 does"),
        ("resnet18d", {"padding": 0}, "--padding 0: resnet18d has none; cnn does"),
        ("timm:vit", {"width": 24}, "--width 24: timm:vit has none; resnet9 does"),
        ("mine.py:Net", {"padding": 0}, "--padding 0: mine.py:Net has none; cnn does"),
    ],
)
def test_an_option_that_a_model_has_not_is_refused_with_the_models_that_have_it(name, option, said):
    with pytest.raises(ValueError, match="none") as refusal:
        classifier(name, 1, 32, 10, **DEFAULTS | option, builder=ResNet9 if name == "mine.py:Net" else None)
    assert str(refusal.value) == said


def test_a_name_that_is_not_there_is_refused_with_those_near_and_all_there_are():
    with pytest.raises(ValueError, match=r"'Resnet-50': did you mean resnet50 .*there are cnn, .*timm:NAME.*FILE\.py:"):
        classifier("Resnet-50", 3, 64, 10)
    with pytest.raises(ValueError, match="no model 'vgg': there are cnn"):
        classifier("vgg", 3, 64, 10)


def test_a_builder_is_called_with_what_the_data_decides_and_its_module_comes_back_as_it_was_made():
    made_of = []

    def mine(channels, image_size, classes):
        made_of.append((channels, image_size, classes))
        model = nn.Sequential(nn.BatchNorm2d(channels), nn.Dropout(), nn.Flatten(), nn.Linear(image_size**2, classes))
        model[0].eval()
        return model

    torch.manual_seed(0)
    expected = mine(1, 6, 4)
    after = torch.rand(1)
    torch.manual_seed(0)
    model = classifier("mine.py:mine", 1, 6, 4, builder=mine, **DEFAULTS)
    assert torch.equal(torch.rand(1), after)  # nothing more was drawn
    assert made_of == [(1, 6, 4)] * 2
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, False, True, True, True]


class Says(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(images)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"a": 1}, "timm:odd gave a dict, not an nn.Module"),
        (Says(lambda images: (images, None)), r"timm:odd answers images \(2, 1, 8, 8\) with a tuple, not \(2, 3\)"),
        (Says(lambda images: images.new_zeros(2, 1000)), r"with \(2, 1000\), not \(2, 3\)"),
        (Says(lambda images: images.new_zeros(3)), r"with \(3,\), not \(2, 3\)"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(7, 3)),
            r"timm:odd cannot take images \(2, 1, 8, 8\): RuntimeError: mat",
        ),
    ],
)
def test_what_timm_gives_must_classify(model, said, monkeypatch):
    monkeypatch.setattr(models, "_from_timm", lambda name, **_: model)
    with pytest.raises(ValueError, match=said):
        classifier("timm:odd", 1, 8, 3)


class StandIn(types.ModuleType):
    """As much of timm as we call, in its place: it is not installed beside these tests."""

    def __init__(self):
        super().__init__("timm")
        self.calls = []

    def list_models(self):
        return ["resnet18", "vit_tiny_patch16_224", "vgg11"]

    def is_model(self, name):
        return name.partition(".")[0] in self.list_models()

    def create_model(self, name, **options):
        unknown = {"resnet18": {"img_size"}, "vgg11": {"img_size", "drop_path_rate"}}.get(name, set())
        for option in options:
            if option in unknown:
                raise TypeError(f"Net.__init__() got an unexpected keyword argument '{option}'")
        if "." in name:
            raise RuntimeError(f"Invalid pretrained tag\nof {name}")
        self.calls.append((name, options))
        return Says(lambda images: images.new_zeros(len(images), options["num_classes"]))


@pytest.fixture
def timm(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return stand_in


def test_timm_is_asked_for_a_new_model_of_our_sizes_and_for_what_it_takes(timm):
    sizes = {"pretrained": False, "num_classes": 7, "in_chans": 1}
    classifier("timm:resnet18", 1, 32, 7, **DEFAULTS)
    classifier("timm:vit_tiny_patch16_224", 1, 32, 7, **DEFAULTS | {"drop_path": 0.1})
    assert timm.calls == [
        ("resnet18", sizes),
        ("vit_tiny_patch16_224", sizes | {"img_size": 32, "drop_path_rate": 0.1}),
    ]


@pytest.mark.parametrize(
    ("name", "drop_path", "said"),
    [
        ("timm:resnet19", 0.0, "timm has no model 'resnet19': did you mean resnet18[?]"),
        ("timm:hf-hub:someone/net", 0.0, "timm has no model 'hf-hub:someone/net'"),
        ("timm:resnet18.a9", 0.0, "timm:resnet18.a9 .*Invalid pretrained tag of resnet18.a9"),
        ("timm:vgg11", 0.1, "--drop-path 0.1: timm:vgg11 has none; resnet18, "),
    ],
)
def test_what_timm_has_not_is_refused(timm, name, drop_path, said):
    with pytest.raises(ValueError, match=said):
        classifier(name, 3, 32, 7, drop_path=drop_path)
    assert not timm.calls


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise RuntimeError('operator torchvision::nms\\n does not exist')", "torchvision::nms does not exist"),
        ("raise OSError('libtorch_cuda.so: cannot open')", "libtorch_cuda"),
        ("import there_is_no_such_module", "there_is_no_such_module"),
    ],
)
def test_a_timm_that_does_not_load_says_why_and_what_to_install(monkeypatch, tmp_path, content, said):
    (tmp_path / "timm.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ValueError, match=f"timm:resnet18: timm does not load .*{said}.*pip install timm"):
        classifier("timm:resnet18", 3, 32, 7)
