"""What the named runs promise of their networks, and that each can be built."""

import pytest
import torch

from jobs import presets
from pipeline.training.classify import make_classifier
from pipeline.training.tasks import ClassifyConfig, Facts

CLASSIFIERS = [name for name, preset in presets.PRESETS.items() if isinstance(preset().task, ClassifyConfig)]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_presets_network_takes_images_of_every_side_that_the_preset_shows(name):
    config = presets.get(name)
    augment, imagenet = config.augment, "resnet" in name
    side = augment.image_size or 28
    facts = Facts(3 if imagenet else 1, side, tuple(map(str, range(1000 if imagenet else 10))), (0.5,), (0.5,))
    with torch.device("meta"):
        model = make_classifier(config.task, facts)
        for px in {side, augment.start_size or side, augment.eval_size or side}:
            assert model(torch.empty(2, facts.channels, px, px)).shape == (2, len(facts.classes))


def test_the_fashion_presets_have_at_most_a_million_parameters():
    facts = Facts(1, 28, tuple("0123456789"), (0.5,), (0.5,))
    for preset in (presets.fashion_fast, presets.fashion_best):
        assert 900_000 < sum(p.numel() for p in make_classifier(preset().task, facts).parameters()) <= 1_000_000


def test_ffcvs_recipe_shows_the_sides_that_it_publishes():
    augment = presets.imagenet_resnet50_88ep().augment
    assert [augment.side(epoch) for epoch in (0, 64, 70, 71, 76, 87)] == [160, 160, 160, 192, 192, 192]
    assert (augment.eval_size, augment.eval_share) == (256, 0.875)
