"""What a step means: losses, their gradients, and what a weight of 0 does."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.loading.augment import to_float
from pipeline.loading.mixup import mixed
from pipeline.loading.steps import Batch
from pipeline.training.optim import OptimConfig
from pipeline.training.saver import HostMemory
from pipeline.training.tasks import ClassifyConfig, Facts, GanConfig, draw_images, make_task, predict
from pipeline.training.world import World

FACTS = Facts(1, 16, ("a", "b", "c"), (0.4,), (0.3,))
GAN = GanConfig(latent=8, width=4)


def batch(n=6, weights=None, seed=0, facts=FACTS):
    random = np.random.default_rng(seed)
    images = torch.from_numpy(
        random.integers(0, 256, (n, facts.image_size, facts.image_size, facts.channels), np.uint8)
    )
    labels = torch.from_numpy(random.integers(0, max(1, len(facts.classes)), n)) - int(not facts.classes)
    weights = torch.ones(n) if weights is None else torch.tensor(weights, dtype=torch.float32)
    return Batch(images, labels, weights, np.arange(n))


def gradients(phase, of):
    torch.manual_seed(7)  # as the loop does before each micro-batch: latents are the same
    phase.module.zero_grad()
    each, numbers = phase.loss(of)
    each.sum().backward(inputs=list(phase.module.parameters()))
    return [p.grad.clone() for p in phase.module.parameters()], {k: v.item() for k, v in numbers.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_classifiers_loss_is_the_sum_of_its_samples_cross_entropies(smoothing):
    task = make_task(ClassifyConfig(label_smoothing=smoothing), FACTS, OptimConfig(), 0, "cpu")
    of = batch()
    each, numbers = task.phases[0].loss(of)
    loss = each.sum()
    images = to_float(of.images, torch.tensor(FACTS.mean), torch.tensor(FACTS.std))
    logits = task.modules["model"](images)
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits, of.labels, reduction="sum", label_smoothing=smoothing).item()
    )
    assert numbers["loss"].item() == loss.item()
    assert numbers["accuracy"].item() == (logits.argmax(1) == of.labels).sum().item()


@pytest.mark.parametrize("config", [ClassifyConfig(), GAN, dataclasses.replace(GAN, r1=2.0)])
def test_a_sample_of_weight_0_changes_neither_gradients_nor_numbers(config):
    task = make_task(config, FACTS, OptimConfig(), 0, "cpu")
    weights = [1, 0, 1, 1, 0, 1]
    one, two = batch(weights=weights), batch(weights=weights)
    for at in (1, 4):
        two.images[at], two.labels[at] = 255 - two.images[at], (two.labels[at] + 1) % 3
    for phase in task.phases:
        (grads, numbers), (others, other_numbers) = gradients(phase, one), gradients(phase, two)
        assert numbers == pytest.approx(other_numbers, rel=1e-6)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(grads, others, strict=True))
        with_all, _ = gradients(phase, batch())
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(grads, with_all, strict=True))


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
def test_the_gans_losses_are_the_non_saturating_ones(classes):
    facts = dataclasses.replace(FACTS, classes=classes)
    task = make_task(GAN, facts, OptimConfig(), 0, "cpu")
    g, d, of = task.modules["generator"], task.modules["discriminator"], batch(facts=facts)
    real = of.images.float().div(127.5).sub(1).permute(0, 3, 1, 2)
    torch.manual_seed(7)
    fake = g(torch.randn(6, 8), of.labels).detach()
    on_real, on_fake = d(real, of.labels).sigmoid(), d(fake, of.labels).sigmoid()
    _, numbers = gradients(task.phases[0], of)
    assert numbers["d_loss"] == pytest.approx(-(on_real.log() + (1 - on_fake).log()).sum().item(), rel=1e-4)
    assert numbers["d_real"] == pytest.approx(on_real.sum().item(), rel=1e-4)
    assert numbers["d_fake"] == pytest.approx(on_fake.sum().item(), rel=1e-4)
    _, numbers = gradients(task.phases[1], of)
    assert numbers["g_loss"] == pytest.approx(-on_fake.log().sum().item(), rel=1e-4)
    assert [phase.name for phase in task.phases] == ["discriminator", "generator"]


def test_a_phase_moves_its_own_module_only():
    task = make_task(dataclasses.replace(GAN, r1=1.0), FACTS, OptimConfig(), 0, "cpu")
    for phase, other in (task.phases, task.phases[::-1]):
        for module in task.modules.values():
            module.zero_grad()
        gradients(phase, batch())
        assert all(p.grad is None for p in other.module.parameters())
        assert all(p.grad is None for p in task.modules["average"].parameters())


def test_r1_is_half_gamma_times_the_squared_slope_on_real_images():
    plain, penalised = (make_task(dataclasses.replace(GAN, r1=r1), FACTS, OptimConfig(), 0, "cpu") for r1 in (0.0, 3.0))
    of, d = batch(weights=[1, 1, 0, 1, 1, 1]), penalised.modules["discriminator"]
    without, _ = gradients(plain.phases[0], of)
    given, _ = gradients(penalised.phases[0], of)
    penalty = 0.0
    for i in np.flatnonzero(of.weights):  # image by image, as the definition has it
        image = of.images[i : i + 1].float().div(127.5).sub(1).permute(0, 3, 1, 2).requires_grad_()
        (slope,) = torch.autograd.grad(d(image, of.labels[i : i + 1]).sum(), image, create_graph=True)
        penalty = penalty + 3.0 / 2 * slope.square().sum()
    by_hand = torch.autograd.grad(penalty, list(d.parameters()), allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in by_hand)
    for whole, plain_part, penalty_part in zip(given, without, by_hand, strict=True):
        expected = plain_part if penalty_part is None else plain_part + penalty_part
        assert torch.allclose(whole, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("classes", [(), ("only",)])
def test_a_classifier_of_fewer_than_two_classes_is_refused(classes):
    with pytest.raises(ValueError, match=f"at least 2 classes, the dataset has {len(classes)}"):
        make_task(ClassifyConfig(), dataclasses.replace(FACTS, classes=classes), OptimConfig(), 0, "cpu")


def test_a_model_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match="no model 'resnet': did you mean resnet9"):
        make_task(ClassifyConfig(model="resnet"), FACTS, OptimConfig(), 0, "cpu")


@pytest.mark.parametrize("config", [ClassifyConfig(ema_half_life=10), GAN])
def test_weights_are_a_function_of_the_seed_and_an_average_starts_there(config):
    one, again, other = (make_task(config, FACTS, OptimConfig(), seed, "cpu").modules for seed in (5, 5, 6))
    torch.manual_seed(0)
    for name, module in one.items():
        pairs = list(zip(module.parameters(), again[name].parameters(), other[name].parameters(), strict=True))
        assert all(torch.equal(p, q) for p, q, _ in pairs)
        assert not all(torch.equal(p, r) for p, _, r in pairs)
    source = one["generator" if config is GAN else "model"]
    assert all(torch.equal(p, q) for p, q in zip(one["average"].parameters(), source.parameters(), strict=True))


@pytest.mark.parametrize("config", [ClassifyConfig(ema_half_life=10), GAN])
def test_a_state_loaded_goes_on_as_the_task_it_came_from(config):
    def advance(task, steps):
        for number in range(steps):
            for phase in task.phases:
                phase.optimizer.zero_grad()
                gradients(phase, batch(seed=number))
                phase.optimizer.step()
            task.after_step(6, 6)

    one, two = (make_task(config, FACTS, OptimConfig(), seed, "cpu") for seed in (0, 1))
    advance(one, 3)
    two.load(HostMemory().copy(one.state()))
    for task in (one, two):
        advance(task, 2)
    for name, module in one.modules.items():
        others = two.modules[name].state_dict()
        assert all(torch.equal(value, others[key]) for key, value in module.state_dict().items())


def test_predictions_lie_at_their_rows_and_skip_what_fills_up():
    task = make_task(ClassifyConfig(), FACTS, OptimConfig(), 0, "cpu")
    whole = batch(10)
    logits = task.modules["model"](to_float(whole.images, torch.tensor(FACTS.mean), torch.tensor(FACTS.std)))
    cut = [
        Batch(whole.images[[6, 7, 8, 9]], whole.labels[[6, 7, 8, 9]], torch.ones(4), np.array([6, 7, 8, 9])),
        Batch(whole.images[:4], whole.labels[:4], torch.ones(4), np.arange(4)),
        Batch(
            whole.images[[4, 5, 0, 0]], whole.labels[[4, 5, 0, 0]], torch.tensor([1.0, 1, 0, 0]), np.array([4, 5, 5, 5])
        ),
    ]
    answers = predict(task, FACTS, cut, 10, World())
    assert answers.labels.tolist() == whole.labels.tolist()
    assert answers.predicted.tolist() == logits.argmax(1).tolist()
    assert answers.confidence == pytest.approx(logits.softmax(1).max(1).values.tolist(), rel=1e-4)
    assert answers.loss == pytest.approx(F.cross_entropy(logits, whole.labels).item(), rel=1e-4)
    assert answers.accuracy == pytest.approx((logits.argmax(1) == whole.labels).float().mean().item())
    assert task.modules["model"].training


def test_predictions_are_the_averages_where_there_is_one():
    task = make_task(ClassifyConfig(ema_half_life=100), FACTS, OptimConfig(), 0, "cpu")
    before = predict(task, FACTS, [batch()], 6, World()).confidence
    with torch.no_grad():
        for p in task.modules["model"].parameters():
            p.add_(1)
    assert np.array_equal(predict(task, FACTS, [batch()], 6, World()).confidence, before)


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
def test_a_drawn_image_depends_on_seed_number_and_label_alone(classes):
    task = make_task(GAN, dataclasses.replace(FACTS, classes=classes), OptimConfig(), 0, "cpu")
    labels = np.arange(300) % 3 if classes else np.full(300, -1)
    many = draw_images(task, labels, 4)
    assert (many.shape, many.dtype) == ((300, 16, 16, 1), np.uint8)
    torch.manual_seed(99)
    for n in (1, 2, 7, 64, 257):
        assert np.array_equal(draw_images(task, labels[:n], 4), many[:n])
    assert not np.array_equal(draw_images(task, labels[:5], 5), many[:5])
    assert len({image.tobytes() for image in many}) == 300
    if classes:
        relabelled = labels.copy()
        relabelled[1] = 2
        again = draw_images(task, relabelled, 4)
        assert np.flatnonzero((again != many).any(axis=(1, 2, 3))).tolist() == [1]


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (ClassifyConfig, "label_smoothing", 1.0),
        (ClassifyConfig, "ema_half_life", -1.0),
        (GanConfig, "latent", 0),
        (GanConfig, "width", 6),
        (GanConfig, "r1", -1.0),
        (GanConfig, "ema_half_life", math.nan),
    ],
)
def test_a_value_that_cannot_work_is_named(config, field, value):
    with pytest.raises(ValueError, match=f"{field} {value}"):
        config(**{field: value})


def test_a_gan_without_half_life_draws_from_the_generator_itself():
    task = make_task(dataclasses.replace(GAN, ema_half_life=0), FACTS, OptimConfig(lr=0.1), 0, "cpu")
    gradients(task.phases[1], batch())
    task.phases[1].optimizer.step()
    task.after_step(6, 6)
    pairs = zip(task.modules["average"].parameters(), task.modules["generator"].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_flip_test_answers_with_the_mean_over_an_image_and_its_mirror_image():
    plain, flipping = (
        make_task(ClassifyConfig(flip_test=flip), FACTS, OptimConfig(), 0, "cpu") for flip in (False, True)
    )
    images = to_float(batch().images, torch.tensor(FACTS.mean), torch.tensor(FACTS.std))
    model = plain.modules["model"]
    logits = (model(images) + model(images.flip(-1))) / 2
    found = predict(flipping, FACTS, [batch()], 6, World())
    assert found.confidence == pytest.approx(logits.softmax(1).max(1).values.tolist(), rel=1e-4)
    assert not np.allclose(found.confidence, predict(plain, FACTS, [batch()], 6, World()).confidence, rtol=1e-4)


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_bce_asks_of_each_class_yes_or_no_and_smooths_its_shares(mixing):
    config = ClassifyConfig(loss="bce", label_smoothing=0.3, mixup=mixing)
    task, of, k = make_task(config, FACTS, OptimConfig(), 0, "cpu"), batch(), len(FACTS.classes)
    images = to_float(of.images, torch.tensor(FACTS.mean), torch.tensor(FACTS.std))
    torch.manual_seed(7)
    each, _ = task.phases[0].loss(of)
    torch.manual_seed(7)
    images, shares = mixed(images, of.labels, k, mixing, 0.0)
    shares, p = shares * 0.7 + 0.3 / k, task.modules["model"](images).sigmoid()
    expected = -(shares * p.log() + (1 - shares) * (1 - p).log()).mean(1)
    assert torch.allclose(each, expected, atol=1e-5)
    with pytest.raises(ValueError, match="loss 'mse': use one of ce, bce"):
        ClassifyConfig(loss="mse")
