import pytest
import torch

from pipeline.models import CLASSIFIERS, GANS
from pipeline.models.cnn import CNN


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
    assert set(CLASSIFIERS) == {"cnn"}
    assert set(GANS) == {"dcgan"}
