"""Mixup and CutMix: what is mixed with what, how much of it, and that nothing but the seed decides."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from test_tasks import FACTS, batch, gradients
from torch.nn import functional as F

from pipeline.loading.augment import to_float
from pipeline.loading.mixup import mixed
from pipeline.training.optim import OptimConfig
from pipeline.training.tasks import ClassifyConfig, make_task

IMAGES = torch.arange(5.0)[:, None, None, None].expand(5, 2, 12, 20)  # each of one colour: 0, 1, 2, 3, 4
LABELS = torch.tensor([0, 1, 2, 0, 1])


def draw(seed, **alphas):
    return mixed(IMAGES, LABELS, 3, **alphas, generator=torch.Generator().manual_seed(seed))


def kept_of(targets):
    """How much each image kept of itself, from sample 1, whose class its neighbour does not share."""
    return targets[1, 1].item()


@pytest.mark.parametrize("seed", range(20))
def test_mixup_blends_images_and_targets_by_one_ratio(seed):
    images, targets = draw(seed, mixup=0.4)
    kept = kept_of(targets)
    assert torch.allclose(images, kept * IMAGES + (1 - kept) * IMAGES.roll(1, 0))
    assert torch.allclose(targets, kept * F.one_hot(LABELS).float() + (1 - kept) * F.one_hot(LABELS.roll(1)).float())


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_one_box_and_counts_its_pixels(seed):
    images, targets = draw(seed, cutmix=1.0)
    pasted = images != IMAGES
    assert torch.equal(images, torch.where(pasted, IMAGES.roll(1, 0), IMAGES))
    assert (pasted == pasted[:1, :1]).all()
    inside = pasted[0, 0]
    down, across = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    assert inside.sum() == len(down) * len(across)  # it is a rectangle
    if len(down):
        assert down[-1] - down[0] + 1 == len(down)
        assert across[-1] - across[0] + 1 == len(across)
    assert kept_of(targets) == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(5))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_ratios_are_drawn_from_the_beta_distribution(alpha):
    ratios = [kept_of(draw(seed, mixup=alpha)[1]) for seed in range(1000)]
    assert stats.kstest(ratios, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_boxes_lie_anywhere_and_are_of_any_size():
    middles, shares = [], []
    for seed in range(600):
        inside = (draw(seed, cutmix=1.0)[0] != IMAGES)[0, 0]
        shares.append(inside.float().mean().item())
        if inside.any():
            middles.append(inside.any(0).nonzero().float().mean().item() / 19)
    tenth, middle, last = np.quantile(middles, [0.1, 0.5, 0.9])
    assert tenth < 0.35 < 0.43 < middle < 0.57 < 0.65 < last
    assert 0.15 < np.mean(shares) < 0.45
    assert 0.6 < max(shares) < 1  # a side of 12 is cut to even lengths, as in the source followed


def test_who_asks_for_both_gets_each_in_half_of_the_batches():
    blended = [bool(((draw(seed, mixup=1.0, cutmix=1.0)[0] % 1) != 0).any()) for seed in range(400)]
    assert 0.4 < np.mean(blended) < 0.6


def test_the_seed_decides_and_nothing_else():
    one, two, other = (draw(seed, mixup=0.3, cutmix=0.7) for seed in (3, 3, 4))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_nothing_to_mix_leaves_what_there_is():
    images, targets = draw(0)
    assert torch.equal(images, IMAGES)
    assert torch.equal(targets, F.one_hot(LABELS).float())
    single, targets = mixed(IMAGES[:1], LABELS[:1], 3, mixup=1.0)
    assert torch.equal(single, IMAGES[:1])
    assert targets.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("config", [ClassifyConfig(mixup=0.4), ClassifyConfig(cutmix=1.0, label_smoothing=0.1)])
def test_the_classifiers_loss_is_that_of_the_mixed_targets(config):
    task = make_task(config, FACTS, OptimConfig(), 0, "cpu")
    of = batch(weights=[1, 1, 0, 1, 1, 1])
    _, numbers = gradients(task.phases[0], of)
    torch.manual_seed(7)
    images = to_float(of.images, torch.tensor(FACTS.mean), torch.tensor(FACTS.std))
    images, targets = mixed(images, of.labels, 3, config.mixup, config.cutmix)
    logits = task.modules["model"](images)
    smooth = targets * (1 - config.label_smoothing) + config.label_smoothing / 3
    each = -(smooth * logits.log_softmax(1)).sum(1) * of.weights
    assert numbers["loss"] == pytest.approx(each.sum().item(), rel=1e-5)
    right = targets[torch.arange(6), logits.argmax(1)] * of.weights
    assert numbers["accuracy"] == pytest.approx(right.sum().item(), rel=1e-5)
    plain = make_task(dataclasses.replace(config, mixup=0.0, cutmix=0.0), FACTS, OptimConfig(), 0, "cpu")
    assert gradients(plain.phases[0], of)[1]["loss"] != pytest.approx(numbers["loss"], rel=1e-3)


@pytest.mark.parametrize(("field", "value"), [("mixup", -0.1), ("cutmix", float("nan")), ("mixup", float("inf"))])
def test_an_alpha_that_cannot_work_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        ClassifyConfig(**{field: value})
