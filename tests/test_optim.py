import copy
import itertools
import math
import sys

import pytest
import torch
from torch import nn

from pipeline.training import averaging, optim
from pipeline.training.optim import OptimConfig


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


@pytest.mark.parametrize(("l1", "l2"), [(0.1, 0.0), (0.0, 0.3), (0.2, 0.05), (0.0, 0.0)])
def test_the_penalties_gradients_are_those_of_autograd(l1, l2):
    ours, theirs = network(), network()
    images = torch.randn(5, 1, 8, 8)
    ours(images).square().sum().backward()
    optim.penalize(ours, l1, l2)
    weights = [p for p in theirs.parameters() if p.ndim > 1]
    penalty = sum(l1 * p.abs().sum() + l2 * p.square().sum() for p in weights)
    (theirs(images).square().sum() + penalty).backward()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_only_matrices_and_kernels_decay_and_every_parameter_is_in_one_group(optimizer):
    module = network()
    groups = optim.make_optimizer(module, OptimConfig(optimizer=optimizer, weight_decay=0.1)).param_groups
    decaying = [p for g in groups if g["weight_decay"] for p in g["params"]]
    assert [p.shape for p in decaying] == [p.shape for p in module.parameters() if p.ndim > 1]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in module.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("config", "bare"),
    [
        (OptimConfig(optimizer="sgd", lr=0.1, momentum=0.7), lambda p: torch.optim.SGD(p, 0.1, momentum=0.7)),
        (
            OptimConfig(optimizer="sgd", lr=0.1, nesterov=True),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        ),
        (OptimConfig(optimizer="adam", lr=0.1, beta1=0.5), lambda p: torch.optim.Adam(p, 0.1, (0.5, 0.999))),
        (
            OptimConfig(optimizer="adamw", lr=0.1, beta2=0.9),
            lambda p: torch.optim.AdamW(p, 0.1, (0.9, 0.9), weight_decay=0),
        ),
    ],
)
def test_each_optimiser_is_torchs_of_that_name(config, bare):
    ours, theirs, images = network(), network(), torch.randn(5, 1, 8, 8)
    one, two = optim.make_optimizer(ours, config), bare(theirs.parameters())
    for rate in (0.1, 0.05, 0.01):
        optim.set_lr(one, rate)
        two.param_groups[0]["lr"] = rate
        for module, optimizer in ((ours, one), (theirs, two)):
            optimizer.zero_grad()
            module(images).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_the_rate_warms_up_in_a_line_and_falls_along_a_cosine_to_zero():
    config = OptimConfig(lr=0.5, warmup_epochs=2)
    rates = [optim.learning_rate(config, s, 10_000, 1000) for s in range(10_001)]
    assert 0 < rates[0] < 0.001
    assert all(a < b for a, b in itertools.pairwise(rates[:2000]))
    assert rates[1000] == pytest.approx(0.25, rel=0.01)
    assert rates[2000] == max(rates) == 0.5
    assert rates[6000] == pytest.approx(0.25)
    assert rates[4000] == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)))
    assert all(a >= b for a, b in itertools.pairwise(rates[2000:]))
    assert rates[10_000] == 0
    assert optim.learning_rate(config, 10_500, 10_000, 1000) == 0  # the overshoot does not rise again


def test_a_triangular_rate_rises_and_falls_in_lines():
    config = OptimConfig(lr=0.5, schedule="triangular", warmup_epochs=2)
    rates = [optim.learning_rate(config, s, 10_000, 1000) for s in range(10_001)]
    assert rates[1000] == pytest.approx(0.25, rel=0.01)
    assert rates[2000] == max(rates) == 0.5
    assert rates[4000] == pytest.approx(0.375)
    assert rates[10_000] == 0


def test_muon_moves_what_lies_between_and_leaves_the_last_layer_and_vectors_to_adamw():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    optimizer = optim.make_optimizer(module, OptimConfig(optimizer="muon", lr=0.02, adamw_lr=0.001))
    optim.set_lr(optimizer, 0.01)  # half of its peak
    by_kind = {group["use_muon"]: group["lr"] for group in optimizer.param_groups}
    assert by_kind == {True: pytest.approx(0.01), False: pytest.approx(0.0005)}
    hidden = [p for g in optimizer.param_groups if g["use_muon"] for p in g["params"]]
    assert [id(p) for p in hidden] == [id(module[0].weight), id(module[2].weight)]
    before = module[2].weight.detach().clone()
    module(torch.randn(5, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = (module[2].weight.detach() - before).flatten(1) / -0.01
    spread = torch.linalg.svdvals(moved)
    assert spread.min() > 0.5  # every direction by about as much: that is what Muon does
    assert spread.max() < 1.5


def test_an_optimiser_whose_library_is_not_there_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="pip install pytorch-optimizer"):
        optim.make_optimizer(network(), OptimConfig(optimizer="lamb"))


def test_frozen_parameters_are_in_no_group_and_are_not_penalised():
    module = network()
    module[0].requires_grad_(False)
    groups = optim.make_optimizer(module, OptimConfig(optimizer="sgd", weight_decay=0.1)).param_groups
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for part in module[1:] for p in part.parameters()}
    module(torch.randn(5, 1, 8, 8)).square().sum().backward()
    optim.penalize(module, 0.1, 0.1)
    assert module[0].weight.grad is None


def test_nesterov_belongs_to_sgd():
    with pytest.raises(ValueError, match="nesterov belongs to --optimizer sgd"):
        OptimConfig(optimizer="adamw", nesterov=True)


def test_a_constant_rate_is_constant_after_its_warm_up():
    config = OptimConfig(lr=0.5, schedule="constant", warmup_epochs=0.1)
    assert optim.learning_rate(config, 0, 1000, 100) < 0.5
    assert {optim.learning_rate(config, s, 1000, 100) for s in range(10, 1000)} == {0.5}
    assert optim.learning_rate(OptimConfig(lr=0.5), 0, 1000, 100) == 0.5


def test_a_run_that_is_all_warm_up_has_a_rate():
    config = OptimConfig(lr=0.5, warmup_epochs=10)
    assert 0 < optim.learning_rate(config, 999, 1000, 100) <= 0.5
    assert optim.learning_rate(config, 1000, 1000, 100) <= 0.5


@pytest.mark.parametrize("per_step", [1, 10, 250, 1000])
def test_an_old_weights_share_of_the_average_halves_in_a_half_life(per_step):
    average, module = network(), network()
    start = [p.detach().clone() for p in average.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    for _ in range(1000 // per_step):
        averaging.average_into(average, module, averaging.halving(1000)(per_step, 0))
    for p, old in zip(average.parameters(), start, strict=True):
        assert torch.allclose(p, old + 0.5, atol=1e-4)


def test_an_average_takes_over_running_statistics_and_without_half_life_everything():
    average, module = network(), network()
    module(torch.randn(9, 1, 8, 8))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3)
    before = copy.deepcopy(average.state_dict())
    averaging.average_into(average, module, averaging.halving(1000)(10, 10))
    for (name, now), new in zip(average.named_buffers(), module.buffers(), strict=True):
        assert torch.equal(now, new)
        assert not torch.equal(now, before[name])
    averaging.average_into(average, module, averaging.halving(0)(10, 20))
    assert all(torch.equal(p, q) for p, q in zip(average.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "lion"), ("schedule", "step"), ("lr", 0.0), ("lr", -1.0), ("lr", math.nan), ("momentum", 1.0),
        ("beta1", -0.1), ("beta2", 1.5), ("weight_decay", -1.0), ("l1", -0.5), ("l2", math.nan),
        ("warmup_epochs", -1.0), ("clip", -1.0), ("adamw_lr", 0.0),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} '?{value}"):
        OptimConfig(**{field: value})
