"""The loop: what is summed and averaged, when it validates, saves and stops; neither micro-batches nor ranks show."""

import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.loading import audit
from pipeline.loading.steps import Batch, Step
from pipeline.training.cadence import LoopConfig, total_steps
from pipeline.training.compute import ComputeConfig
from pipeline.training.loop import NotFinite, take_phase, train
from pipeline.training.optim import OptimConfig, make_optimizer
from pipeline.training.saver import HostMemory
from pipeline.training.tasks import ClassifyConfig, Facts, GanConfig, Phase, Task, make_task
from pipeline.training.world import Contact, World

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = Facts(1, 16, ("a", "b", "c"), (0.4,), (0.3,))
SGD = OptimConfig(optimizer="sgd", lr=0.01, schedule="constant")
SAMPLES = 96


class Normed(nn.Module):
    """Batch norm, and dropout on request."""

    def __init__(self, dropout: float = 0.0, momentum: float | None = 0.1):
        super().__init__()
        norm = nn.BatchNorm2d(4, momentum=momentum)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Dropout(dropout), nn.Flatten())
        self.head = nn.Linear(4 * 14 * 14, 3)

    def forward(self, images):
        return self.head(self.body(images))


def normed(optim=SGD, **options):
    torch.manual_seed(1)
    model = Normed(**options)

    def loss(batch):
        logits = model(batch.images.permute(0, 3, 1, 2).float() / 255)
        each = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        each = each * batch.weights
        return each, {"loss": each.detach().sum()}

    return Task({"model": model}, [Phase("model", model, make_optimizer(model, optim), loss)])


def classifier(optim=SGD, compute=None, **options):
    return make_task(ClassifyConfig(**options), FACTS, optim, 0, "cpu", compute or ComputeConfig())


KINDS = {
    "cnn": lambda: make_task(ClassifyConfig(ema_half_life=100), FACTS, SGD, 0, "cpu"),
    "gan": lambda: make_task(GanConfig(latent=8, width=4, r1=0.5), FACTS, SGD, 0, "cpu"),
    "batch norm": normed,
    "batch norm, cumulative": lambda: normed(momentum=None),
    "dropout": lambda: normed(dropout=0.5),
    "bf16, channels last, mixed": lambda: classifier(
        replace(SGD, nesterov=True), ComputeConfig("bf16", True), ema_half_life=100, mixup=0.5, cutmix=1.0, loss="bce"
    ),
    "fp16": lambda: classifier(compute=ComputeConfig("fp16")),
    "frozen": lambda: classifier(freeze="features.0,classifier.1"),
    "lamb": lambda: classifier(OptimConfig(optimizer="lamb")),
    "muon": lambda: classifier(OptimConfig(optimizer="muon", lr=0.02), ema_half_life=100),
}


def steps_of(config: LoopConfig, rank=0, world=1, start=0):
    """Endless steps over 96 fixed random samples, in order."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (SAMPLES, 16, 16, 1), np.uint8))
    labels = torch.from_numpy(random.integers(0, 3, SAMPLES))
    number, own = start, range(rank, config.micro_batches, world)
    while True:
        parts = []
        for j in own:
            rows = np.arange(number * config.batch + j, (number + 1) * config.batch, config.micro_batches) % SAMPLES
            parts.append(Batch(images[rows], labels[rows], torch.ones(len(rows)), rows))
        yield Step(number, own, parts)
        number += 1


@dataclass
class Kept:
    """A Saver's place: keeps what it is given."""

    saves: list = field(default_factory=list)

    def save(self, state, samples, rows, validation):
        self.saves.append((HostMemory().copy(state), samples, rows, validation))

    def wait(self):
        pass


def run(config, task, optim=SGD, world=None, start=0, validate=dict, report=lambda row: None):
    world, saver = world or World(), Kept()
    steps = steps_of(config, world.rank, world.size, start)
    last = train(config, optim, task, steps, SAMPLES, world, validate, saver, Contact(report))
    return saver.saves, last


class Threads:
    """Ranks as threads of this process: `sum_` adds in the order of the ranks, as a process group would.

    torch's generator is one for the process, so that only one rank at a time may compute: the one whose turn it is.
    """

    def __init__(self, size):
        self.size, self.barrier, self.given = size, threading.Barrier(size, timeout=60), {}
        self.turn = threading.Lock()

    def world(self, rank):
        outer = self

        @dataclass(frozen=True)
        class Rank(World):
            def sum_(self, tensor):
                outer.given[self.rank] = tensor.clone()
                outer.wait()
                tensor.copy_(sum(outer.given[r] for r in range(1, self.size)) + outer.given[0])
                outer.wait()
                return tensor

        return Rank(rank, self.size)

    def wait(self):
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def run(self, body):
        """[body(world) of each rank]; raises what the first to fail raised."""
        results, errors = {}, []

        def rank_body(rank):
            with self.turn:
                try:
                    results[rank] = body(self.world(rank))
                except BaseException as error:
                    errors.append(error)
                    self.barrier.abort()

        threads = [threading.Thread(target=rank_body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(self.size)]


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}{name}/").items()}
    if isinstance(tree, list | tuple):
        return flat(dict(enumerate(tree)), prefix)
    return {prefix: tree}


def differences(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    return {name: (one[name], other[name]) for name in one if not _equal(one[name], other[name])}


def _equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("optim", [SGD, replace(SGD, l1=1e-3, l2=1e-2), OptimConfig(lr=1e-3)])
def test_micro_batches_summed_are_one_big_batch(optim):
    def after(v):
        task = make_task(ClassifyConfig(), FACTS, optim, 0, "cpu")
        ((state, _, rows, _),) = run(LoopConfig(epochs=1, batch=16, micro_batches=v), task, optim)[0]
        return flat(state["task"]["modules"]), [row["loss"] for row in rows]

    (whole, losses), (parts, other_losses) = after(1), after(8)
    assert losses == pytest.approx(other_losses, rel=1e-4)
    tolerance = 1e-5 if optim.optimizer == "sgd" else 2e-3  # adam divides by tiny second moments
    assert all(torch.allclose(whole[name], parts[name], atol=tolerance) for name in whole)


def test_gradients_are_the_mean_over_the_step():
    task, config = normed(), LoopConfig(batch=16, micro_batches=1)
    model, step = task.phases[0].module, next(steps_of(config))
    loss = task.phases[0].loss(step.micro_batches[0])[0].sum()
    expected = torch.autograd.grad(loss / 16, list(model.parameters()))
    numbers = take_phase(config, SGD, 0, task.phases[0], step, World())
    assert numbers["loss"] == pytest.approx(loss.item() / 16, rel=1e-5)
    assert all(torch.allclose(p.grad, g, atol=1e-7) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_end_with_the_weights_and_statistics_of_one(kind):
    config = LoopConfig(epochs=1, batch=16, micro_batches=2)
    alone, last = run(config, KINDS[kind]())
    for saves, row in Threads(2).run(lambda world: run(config, KINDS[kind](), world=world)):
        assert differences(saves[-1][0], alone[-1][0]) == {}
        assert {k: v for k, v in row.items() if k != "time"} == {k: v for k, v in last.items() if k != "time"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_ranks_share_does_not_depend_on_what_else_it_computed(kind):
    """Each micro-batch starts from the step's statistics and a generator of its own: order does not show."""
    config = LoopConfig(batch=16, micro_batches=4)
    step = next(steps_of(config))
    there, back = KINDS[kind](), KINDS[kind]()
    reverse = Step(0, step.own[::-1], step.micro_batches[::-1])
    for number, (one, two) in enumerate(zip(there.phases, back.phases, strict=True)):
        numbers = take_phase(config, SGD, number, one, step, World())
        assert take_phase(config, SGD, number, two, reverse, World()) == pytest.approx(numbers, rel=1e-5)
        for (name, a), b in zip(one.module.state_dict().items(), two.module.state_dict().values(), strict=True):
            assert torch.allclose(a, b, atol=1e-6), name


def test_running_statistics_move_by_the_mean_of_the_micro_batches_changes():
    config = LoopConfig(batch=16, micro_batches=4)
    task, step = normed(), next(steps_of(config))
    norm = task.phases[0].module.body[1]
    moved = []
    for batch in step.micro_batches:
        fresh = normed()
        fresh.phases[0].loss(batch)
        moved.append(fresh.phases[0].module.body[1].running_mean)
    take_phase(config, SGD, 0, task.phases[0], step, World())
    assert torch.allclose(norm.running_mean, torch.stack(moved).mean(0), atol=1e-6)
    assert norm.num_batches_tracked.item() == 1


def test_dropout_and_latents_are_drawn_anew_for_each_step_and_micro_batch_and_again_alike():
    def losses(seed):
        config = LoopConfig(epochs=1, batch=16, micro_batches=2, seed=seed)
        rows = []
        run(config, normed(dropout=0.5), report=rows.append)
        return [row["loss"] for row in rows]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)
    config, task = LoopConfig(batch=8, micro_batches=2), normed(replace(SGD, lr=1e-12), dropout=0.5)
    step = next(steps_of(config))
    twice = [replace(step, number=n, own=range(1), micro_batches=step.micro_batches[:1]) for n in (0, 1, 0)]
    first, other, again = (take_phase(config, SGD, 0, task.phases[0], one, World())["loss"] for one in twice)
    assert first != pytest.approx(other, rel=1e-3)
    assert first == pytest.approx(again, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_and_gone_on_ends_as_one_unbroken(kind):
    config = LoopConfig(epochs=2, batch=16, micro_batches=2, checkpoint_every=32)
    saves, _ = run(config, KINDS[kind]())
    state, samples, _, _ = saves[2]
    task = KINDS[kind]()
    task.load(HostMemory().copy(state)["task"])
    again, _ = run(config, task, start=samples // 16)
    assert differences(again[-1][0], saves[-1][0]) == {}


def test_gradients_are_clipped_once_over_the_whole_step_and_their_norm_is_logged():
    config, step = LoopConfig(batch=16, micro_batches=4), next(steps_of(LoopConfig(batch=16, micro_batches=4)))
    plain, clipped = normed(), normed()
    norm = take_phase(config, replace(SGD, clip=1e9), 0, plain.phases[0], step, World())["model_gradient_norm"]
    expected = torch.cat([p.grad.flatten() for p in plain.phases[0].module.parameters()])
    assert norm == pytest.approx(expected.norm().item(), rel=1e-5)
    take_phase(config, replace(SGD, clip=norm / 8), 0, clipped.phases[0], step, World())
    assert torch.allclose(
        torch.cat([p.grad.flatten() for p in clipped.phases[0].module.parameters()]), expected / 8, atol=1e-6
    )


def test_a_step_whose_scaled_gradients_overflow_is_left_out_and_the_scale_halved():
    config, task = LoopConfig(epochs=1, batch=16, micro_batches=2), KINDS["fp16"]()
    task.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before, rows = HostMemory().copy(task.state()["modules"]), []
    steps = steps_of(config)
    row = take_phase(config, SGD, 0, task.phases[0], next(steps), World(), (), task.scaler)
    assert row["loss_scale"] == 2.0**126
    assert differences(task.state()["modules"], before) == {}
    saves, _ = run(config, KINDS["fp16"](), report=rows.append)
    assert {row["loss_scale"] for row in rows} == {2.0**16}
    assert saves[-1][0]["task"]["scaler"]["scale"] == 2.0**16


def test_a_scaled_loss_is_clipped_by_what_its_gradients_are_unscaled():
    def norm(compute):
        task, config = classifier(compute=compute), LoopConfig(batch=16, micro_batches=2)
        clipped = replace(SGD, clip=1e-3)
        return take_phase(config, clipped, 0, task.phases[0], next(steps_of(config)), World(), (), task.scaler)

    plain, scaled = norm(ComputeConfig()), norm(ComputeConfig("fp16"))
    assert scaled["loss_scale"] == 2.0**16
    assert scaled["model_gradient_norm"] == pytest.approx(plain["model_gradient_norm"], rel=0.05)


# ---- early stopping


def stopping_early(accuracies, patience, start=0, best=None):
    """Steps until the run ends, the validations giving these accuracies, one every two steps of 16."""
    config = LoopConfig(epochs=5, batch=16, micro_batches=2, validate_every=32, patience=patience)
    given, saver, rows = iter(accuracies), Kept(), []
    row = train(
        config, SGD, KINDS["cnn"](), steps_of(config, start=start), SAMPLES, World(),
        lambda: {"loss": 1.0, "accuracy": next(given)}, saver, Contact(rows.append), best=best,
    )  # fmt: skip
    return row, saver.saves


def test_a_run_ends_after_as_many_validations_without_a_better_accuracy_as_it_has_patience_for():
    row, saves = stopping_early([0.5, 0.6, 0.6, 0.5, 0.9], patience=2)
    assert (row["step"], row["early_stop"]) == (8, True)
    assert [save[0]["over"] for save in saves] == [False] * 3 + [True]
    assert saves[-1][2][-1]["early_stop"]  # in the metrics, too
    row, saves = stopping_early([0.5] + [0.4] * 14, patience=0)
    assert (row["step"], saves[-1][0]["over"]) == (30, True)
    assert "early_stop" not in row


def test_patience_is_counted_over_restarts():
    _, saves = stopping_early([0.5, 0.4, 0.4, 0.4], patience=3)
    state = saves[1][0]
    assert state["best"] == (0.5, 1)
    row, _ = stopping_early([0.4, 0.4, 0.4], patience=3, start=4, best=state["best"])
    assert row["step"] == 8


# ---- what a row says of the samples


def rows_of(config, kind="cnn", steps=None, world=None):
    rows, world = [], world or World()
    steps = steps or steps_of(config, world.rank, world.size)
    train(config, SGD, KINDS[kind](), steps, SAMPLES, world, dict, None, Contact(rows.append))
    return rows


def expected_digest(step, batch, less=()):
    """Of one step of `steps_of`, without the positions `less`."""
    positions = np.setdiff1d(np.arange(step * batch, (step + 1) * batch), less)
    return audit.written(audit.digest(audit.digest_parts(positions // SAMPLES, positions % SAMPLES)))


@pytest.mark.parametrize("kind", ["cnn", "gan"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_row_has_the_digest_of_the_samples_of_all_ranks_once(kind, size):
    config = LoopConfig(epochs=1.5, batch=20, micro_batches=4)  # step 5 holds samples of two epochs
    expected = [expected_digest(step, 20) for step in range(8)]
    for rows in Threads(size).run(lambda world: rows_of(config, kind, world=world)):
        assert [row["samples_digest"] for row in rows] == expected
        assert not any("set_aside" in row for row in rows)


@pytest.mark.parametrize("size", [1, 2])
def test_samples_set_aside_are_counted_and_their_stand_ins_are_not_in_the_digest(size):
    config = LoopConfig(epochs=1, batch=16, micro_batches=2)

    def with_bad_ones(world):
        for step in steps_of(config, world.rank, world.size):
            for batch in step.micro_batches:
                if step.number == 2:  # places 0 and 1 of each micro-batch: positions 32 to 35
                    batch.weights[:2] = 0
                    batch.rows[:2] = batch.rows[5]
            yield step

    for rows in Threads(size).run(lambda world: rows_of(config, steps=with_bad_ones(world), world=world)):
        assert [row.get("set_aside") for row in rows] == [None, None, 4, None, None, None]
        expected = [expected_digest(step, 16, less=range(32, 36)) for step in range(6)]
        assert [row["samples_digest"] for row in rows] == expected


# ---- failures


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    task, config = normed(), LoopConfig(epochs=1, batch=16, micro_batches=2)
    plain, calls, saver = task.phases[0].loss, [], Kept()

    def breaking(batch):
        calls.append(1)
        each, numbers = plain(batch)
        return (each, numbers) if len(calls) != 5 else (each * torch.inf, {"loss": numbers["loss"] * torch.inf})

    task.phases[0].loss = breaking
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 3 \(48 samples\)"):
        train(config, SGD, task, steps_of(config), SAMPLES, World(), dict, saver, Contact())
    assert not saver.saves


def test_weights_that_are_not_finite_never_become_a_checkpoint():
    """A finite loss whose gradient is not: at the step that saves, no later loss would show it."""
    task, config, saver = normed(), LoopConfig(epochs=1, batch=16, micro_batches=1), Kept()
    plain, calls = task.phases[0].loss, []

    def breaking(batch):
        calls.append(1)
        each, numbers = plain(batch)
        weight = task.phases[0].module.head.weight
        return (each + (weight - weight.detach()).abs().sqrt().sum() if len(calls) == 6 else each), numbers

    task.phases[0].loss = breaking
    with pytest.raises(FloatingPointError, match="a weight of the model is not finite at step 6"):
        train(config, SGD, task, steps_of(config), SAMPLES, World(), dict, saver, Contact())
    assert not saver.saves


def breaking_at(task, call, spoil):
    """The task, whose first phase's losses go through `spoil(each, numbers)` at one call."""
    plain, calls = task.phases[0].loss, []

    def loss(batch):
        calls.append(1)
        each, numbers = plain(batch)
        return spoil(each, numbers) if len(calls) == call else (each, numbers)

    task.phases[0].loss = loss
    return task


def one_sample_bad(each, numbers):
    """The third of a micro-batch has a loss that is not a number."""
    spoiled = torch.where(torch.arange(len(each)) == 2, torch.nan, 1.0) * each
    return spoiled, {"loss": spoiled.detach().sum()}


@pytest.mark.parametrize("size", [1, 2])
def test_the_samples_whose_loss_is_not_finite_are_named_to_every_rank(size):
    config = LoopConfig(epochs=1, batch=16, micro_batches=2)

    def body(world):
        # micro-batch 1 of step 3, whichever rank has it
        call = {1: 6, 2: 3 if world.rank == 1 else -1}[size]
        task = breaking_at(normed(), call, one_sample_bad)
        with pytest.raises(NotFinite) as found:
            run(config, task, world=world)
        return found.value.rows, str(found.value)

    for rows, said in Threads(size).run(body):
        assert rows == (2 * 16 + 1 + 2 * 2,)
        assert said == "loss is not finite at step 3 (48 samples)"


def steep(each, numbers):
    """A finite loss whose gradient is not."""
    return each + (each - each.detach()).abs().sqrt(), numbers


@pytest.mark.parametrize("spoil", [one_sample_bad, steep])
@pytest.mark.parametrize("size", [1, 2])
def test_as_many_steps_that_are_not_finite_as_allowed_are_passed_over(spoil, size):
    """As if the step had drawn nothing: weights, statistics and counters after it are those before it."""
    config = LoopConfig(epochs=1, batch=16, micro_batches=2, skip_nonfinite=1, checkpoint_every=16)
    per_step = 2 // size

    def body(world):
        task = breaking_at(normed(), 2 * per_step + 1, spoil)
        return run(config, task, world=world)[0]

    for saves in Threads(size).run(body):
        rows = [row for _, _, rows, _ in saves for row in rows]
        assert [row["step"] for row in rows if "skipped" in row] == [3]
        assert "loss" not in rows[2] or np.isfinite(rows[2]["loss"])
        assert [state["skipped"] for state, *_ in saves] == [0, 0, 1, 1, 1, 1]
        before, after = saves[1][0]["task"], saves[2][0]["task"]
        assert differences(before, after) == {}
        assert differences(after, saves[3][0]["task"]) != {}


def test_one_more_step_that_is_not_finite_stops_the_run_and_steps_before_a_resume_count():
    config = LoopConfig(epochs=1, batch=16, micro_batches=2, skip_nonfinite=1)
    task = breaking_at(normed(), 5, one_sample_bad)
    with pytest.raises(NotFinite, match="at step 3"):
        train(config, SGD, task, steps_of(config), SAMPLES, World(), dict, None, Contact(), skipped=1)


@pytest.mark.parametrize(("size", "asked"), [(1, 0), (2, 0), (2, 1)])
def test_a_rank_that_is_asked_to_stop_stops_all_after_the_same_step_with_a_checkpoint(size, asked):
    config = LoopConfig(epochs=1, batch=16, micro_batches=2)

    def body(world):
        steps, saver, seen = steps_of(config, world.rank, world.size), Kept(), []
        contact = Contact(seen.append, lambda: world.rank == asked and len(seen) >= 2)
        row = train(config, SGD, normed(), steps, SAMPLES, world, dict, saver, contact)
        return row, saver.saves

    for row, saves in Threads(size).run(body):
        assert (row["step"], row["stopped"]) == (3, True)
        assert [samples for _, samples, *_ in saves] == [48]
        assert [row["step"] for row in saves[0][2]] == [1, 2, 3]
        assert "stopped" not in saves[0][2][-1]


def test_who_is_asked_to_stop_at_the_last_step_is_done():
    config = LoopConfig(epochs=1, batch=16, micro_batches=2)
    saver = Kept()
    contact = Contact(asked=lambda: True)
    row = train(config, SGD, normed(), steps_of(config, start=5), SAMPLES, World(), dict, saver, contact)
    assert row["samples"] == SAMPLES
    assert "stopped" not in row


def test_time_goes_where_it_is_spent_and_each_step_shows_in_the_clock():
    config, world = LoopConfig(epochs=1, batch=16, micro_batches=2), World()
    seen = []

    def slow():
        for step in steps_of(config):
            time.sleep(0.02)
            yield step

    def validate():
        time.sleep(0.1)
        return {}

    contact = Contact(lambda row: seen.append((world.clock.step, world.clock.laps)))
    train(config, SGD, normed(), slow(), SAMPLES, world, validate, None, contact)
    assert world.clock.seconds["data"] >= 0.12
    assert world.clock.seconds["validation"] >= 0.1
    assert [step for step, _ in seen] == list(range(6))
    assert len({laps for _, laps in seen}) == 1


# ---- cadence


def test_seconds_between_checkpoints_are_counted_from_the_last_of_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    config = LoopConfig(epochs=2, batch=16, micro_batches=2, checkpoint_every="30s")

    def report(row):
        now[0] += 8  # a step takes so long

    saves, _ = run(config, normed(), report=report)
    # 30 s are over before step 5; the epoch's end at step 6 saves too, and counting begins anew
    assert [samples // 16 for _, samples, *_ in saves] == [5, 6, 11, 12]


@pytest.mark.parametrize(
    ("options", "validated", "saved"),
    [
        ({}, [96, 192], [96, 192]),
        ({"validate_every": 64}, [64, 128, 192], [64, 128, 192]),
        ({"checkpoint_every": 40}, [96, 192], [48, 80, 96, 128, 160, 192]),
        ({"validate_every": 50, "checkpoint_every": 100}, [64, 112, 160, 192], [64, 112, 160, 192]),
        ({"validate_every": 1}, [*range(16, 193, 16)], [*range(16, 193, 16)]),
        ({"validate_every": 10_000}, [192], [192]),
        ({"epochs": 1.4, "batch": 24}, [96, 144], [96, 144]),
        ({"epochs": 0.001}, [16], [16]),
    ],
)
def test_validations_and_checkpoints_come_when_they_should(options, validated, saved):
    config = LoopConfig(**{"epochs": 2, "batch": 16, "micro_batches": 2} | options)
    reported, validations = [], []

    def validate():
        validations.append(1)
        return {"accuracy": len(validations) / 100}

    saves, last = run(config, normed(), validate=validate, report=reported.append)
    assert [row["samples"] for row in reported if "val_accuracy" in row] == validated
    assert [samples for _, samples, _, _ in saves] == saved
    assert [state["samples"] for state, *_ in saves] == saved
    assert [bool(validation) for *_, validation in saves] == [s in validated for s in saved]
    kept = [row for _, _, rows, _ in saves for row in rows]
    assert kept == reported
    assert [row["step"] for row in kept] == list(range(1, len(kept) + 1))
    assert [row["samples"] for row in kept] == [row["step"] * config.batch for row in kept]
    assert kept[-1] == last
    assert last["val_accuracy"] == len(validated) / 100
    assert last["epoch"] == last["samples"] / SAMPLES


@pytest.mark.parametrize("epochs", [0.001, 0.5, 1, 1.01, 3, 7.3])
@pytest.mark.parametrize("batch", [1, 7, 64, 96, 97, 1000])
def test_a_run_draws_what_its_epochs_ask_and_less_than_a_batch_more(epochs, batch):
    asked = epochs * SAMPLES
    drawn = total_steps(LoopConfig(epochs=epochs, batch=batch), SAMPLES) * batch
    assert round(asked) <= drawn
    assert drawn < round(asked) + batch or drawn == batch


def test_a_finished_run_takes_no_step():
    config, rows = LoopConfig(epochs=1, batch=16, micro_batches=1), []
    saves, last = run(config, normed(), start=6, report=rows.append)
    assert (saves, last, rows) == ([], {}, [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0.0), ("epochs", -1.0), ("epochs", float("nan")), ("epochs", float("inf")), ("seed", -1),
        ("seed", 2**63), ("validate_every", -1), ("checkpoint_every", -5), ("keep", 0), ("skip_nonfinite", -1),
        ("checkpoint_every", "often"), ("checkpoint_every", "5m"), ("checkpoint_every", 2.5),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} '?{value}"):
        LoopConfig(**{field: value})
