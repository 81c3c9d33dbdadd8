"""The training loop, top to bottom. It knows no Ray: ranks are a World, checkpoints a Saver.

for each step, for each phase:
    for each of this rank's micro-batches: loss -> backward            gradients add up, scaled by 1/B
    one sum over the ranks of [gradients, logged numbers, running statistics; the first time, what `_together` says]
    optimizer step
then, when due: validate, checkpoint
"""

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from pipeline import draw
from pipeline.loading import audit
from pipeline.loading.order import Batching
from pipeline.loading.steps import Step
from pipeline.training import optim
from pipeline.training.cadence import LoopConfig, Saving, between_snapshots, passes, total_steps
from pipeline.training.compute import check_compiled
from pipeline.training.optim import OptimConfig
from pipeline.training.saver import Saver
from pipeline.training.tasks import Phase, Task
from pipeline.training.world import Contact, World

_STEP = draw.text_bits("loop/step")


class NotFinite(FloatingPointError):
    """`what` (a loss, a gradient, a weight) is not a finite number. `rows`: of samples whose loss is not, sorted."""

    def __init__(self, what: str, rows: tuple[int, ...] = ()):
        super().__init__(what)
        self.what, self.rows = what, rows

    def at(self, row: dict) -> "NotFinite":
        """The same, saying where."""
        where = f"{self.what} is not finite at step {row['step']} ({row['samples']} samples)"
        return NotFinite(where, self.rows)


def train(
    config: LoopConfig,
    optim_config: OptimConfig,
    task: Task,
    steps: Iterable[Step],
    epoch: int,
    world: World,
    validate: Callable[[], dict],
    saver: Saver | None,
    contact: Contact,
    skipped: int = 0,
    best: tuple[float, int] | None = None,
) -> dict:
    """Trains `task` on `steps`, which begin where the run stands, up to the run's last; returns the last row logged.

    `epoch`: samples in one. `validate()` runs on every rank and gives numbers, or {}. `saver`: rank 0's, None on
    others. `contact.report` sees every row; once `contact.asked()` on some rank, all take a checkpoint after the step
    in flight, and the row returned has `stopped`. `skipped`: steps passed over before. `best`: the highest validation
    accuracy so far, and how many validations have come since: `config.patience` of them end the run, and the row has
    `early_stop`.

    Raises NotFinite, on every rank alike.
    """
    clock, saving = world.clock, Saving(config)
    total, validate_every = total_steps(config, epoch), config.validate_every or epoch
    snapshot_every = between_snapshots(total * config.batch, task.snapshots)
    rows, row, best = [], {}, best or (-1.0, 0)
    clock.lap("start")
    for step in steps:
        clock.lap("data")
        clock.begin(step.number)
        if step.number >= total:
            break
        if not row:
            _check_compiled(config, task, step, world)
        before, seen = step.number * config.batch, (step.number + 1) * config.batch
        rate = optim.learning_rate(optim_config, before, total * config.batch, epoch)
        row = {"step": step.number + 1, "samples": seen, "epoch": seen / epoch, "lr": rate}
        together = _together(config, step, epoch, world, contact.asked(), world.rank == 0 and saving.due())
        for number, phase in enumerate(task.phases):
            optim.set_lr(phase.optimizer, rate)
            beside = () if number else (together,)
            try:
                row |= take_phase(config, optim_config, number, phase, step, world, beside, task.scaler)
            except NotFinite as found:
                if skipped >= config.skip_nonfinite:
                    raise found.at(row) from None
                row["skipped"] = 1
        task.after_step(config.batch, seen)
        *drawn, stop, due = together.tolist()
        row |= _drawn_fields(drawn)
        row["time"] = time.time()
        skipped += "skipped" in row
        ending = step.number + 1 == total
        validating = ending or passes(validate_every, before, seen)
        snapshot = passes(snapshot_every, before, seen)
        saves = validating or stop or due or snapshot or passes(saving.samples, before, seen)
        if saves:
            _check_weights(task, row)  # on every rank, so that none goes on alone
        clock.lap("compute")
        validation = validate() if validating else {}
        clock.lap("validation")
        row |= {f"val_{name}": value for name, value in validation.items()}
        if "accuracy" in validation:
            best = (validation["accuracy"], 0) if validation["accuracy"] > best[0] else (best[0], best[1] + 1)
            if 0 < config.patience <= best[1] and not ending:
                row, ending = row | {"early_stop": True}, True
        rows.append(row)
        contact.report(row)
        if saver and saves:
            state = {"task": task.state(), "samples": seen, "skipped": skipped, "best": best, "over": ending}
            saver.save(state, seen, rows, validation)
            rows = []
        if saves:
            saving.done()
        clock.lap("checkpoint")
        if ending or stop:
            row = row if ending else row | {"stopped": True}
            break
    if saver:
        saver.wait()
        clock.lap("checkpoint")
    return row


def _check_compiled(config: LoopConfig, task: Task, step: Step, world: World) -> None:
    """Before the first step of a start, on its first images; nothing is drawn or changed that a step would see."""
    for phase in task.phases:

        def loss(phase=phase) -> torch.Tensor:
            _seed(config.seed, world)
            return phase.loss(step.micro_batches[0])[0].sum() / config.batch

        check_compiled(phase.module, loss)


def _together(config: LoopConfig, step: Step, epoch: int, world: World, stop: bool, due: bool) -> torch.Tensor:
    """What the ranks add up beside gradients, float32 (7,): the digest of the samples (4 parts) and how many of them
    were set aside; how many ranks were told to stop; whether the time has come for a checkpoint, by rank 0's clock."""
    batching = Batching(config.batch, config.micro_batches)
    epochs = np.concatenate([batching.positions(step.number, j) // epoch for j in step.own])
    rows = np.concatenate([batch.rows for batch in step.micro_batches])
    kept = np.concatenate([batch.weights.cpu().numpy() for batch in step.micro_batches]) > 0  # else it is a stand-in
    parts = audit.digest_parts(epochs[kept], rows[kept])
    numbers = [*parts.tolist(), int((~kept).sum()), stop, due]
    return torch.tensor(numbers, dtype=torch.float32, device=world.device)


def _drawn_fields(drawn: list[float]) -> dict:
    """`samples_digest`, which `audit` compares with the order, and `set_aside` where samples were."""
    *parts, set_aside = (int(number) for number in drawn)
    return {"samples_digest": audit.written(audit.digest(parts))} | ({"set_aside": set_aside} if set_aside else {})


def take_phase(
    config: LoopConfig,
    optim_config: OptimConfig,
    number: int,
    phase: Phase,
    step: Step,
    world: World,
    beside: tuple[torch.Tensor, ...] = (),
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, float]:
    """One phase of one step: gradients over all micro-batches of all ranks, one optimiser step. Returns its numbers.

    `beside`: float32 tensors that are summed over the ranks as well, in place. `scaler`: fp16's; a step whose scaled
    gradients overflow is left out, by its rules, and the scale halved. Raises NotFinite, on every rank, before anything
    but the optimiser's gradients has changed.
    """
    parameters = [p for p in phase.module.parameters() if p.requires_grad]
    statistics = [b for b in phase.module.buffers() if b.is_floating_point()]  # batch norm's running ones
    counters = [b for b in phase.module.buffers() if not b.is_floating_point()]  # its number of batches
    start, counted = [b.clone() for b in statistics], [b.clone() for b in counters]
    drift = [torch.zeros_like(b) for b in statistics]
    phase.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    losses = []
    for j, batch in zip(step.own, step.micro_batches, strict=True):
        _seed(int(draw.bits(_STEP, config.seed, step.number, number, j) >> np.uint64(1)), world)
        if counters:  # so that a step counts once, however many micro-batches this rank has
            torch._foreach_copy_(counters, counted)
        each, numbers = phase.loss(batch)
        total = each.sum() / config.batch
        (scaler.scale(total) if scaler else total).backward(inputs=parameters)
        losses.append(each.detach())
        sums = {name: sums.get(name, 0) + value for name, value in numbers.items()}
        # Every micro-batch starts from the step's statistics, and their changes are averaged: so ranks do not show.
        if statistics:
            torch._foreach_add_(drift, torch._foreach_sub(statistics, start))
            torch._foreach_copy_(statistics, start)
    gradients = [p.grad for p in parameters]
    logged = torch.stack([value.detach().float() for value in sums.values()])
    if world.size > 1:
        world.settle()  # or what the device has still to compute would be timed as communication
        world.clock.lap("compute")
        world.sum_all_([*gradients, *drift, logged, *beside])
        world.settle()
        world.clock.lap("communication")
    numbers = dict(zip(sums, (logged / config.batch).tolist(), strict=True))
    bad = [name for name, value in numbers.items() if not np.isfinite(value)]
    # Not looked for otherwise: it costs each step. With a scaler that is its work.
    if not bad and config.skip_nonfinite and not scaler and not _finite(gradients):
        bad = ["a gradient"]
    if bad:
        if counters:
            torch._foreach_copy_(counters, counted)
        raise NotFinite(", ".join(bad), _not_finite_rows(config, step, losses, world))
    if statistics:
        torch._foreach_copy_(statistics, torch._foreach_add(start, torch._foreach_div(drift, config.micro_batches)))
    if scaler:
        scaler.unscale_(phase.optimizer)
    optim.penalize(phase.module, optim_config.l1, optim_config.l2)
    if optim_config.clip:
        numbers[f"{phase.name}_gradient_norm"] = float(optim.clip(parameters, optim_config.clip))
    if scaler:
        scaler.step(phase.optimizer)
        scaler.update()
        numbers["loss_scale"] = scaler.get_scale()
    else:
        phase.optimizer.step()
    return numbers


def _seed(seed: int, world: World) -> None:
    """Seeds what is drawn on this rank's device. (torch.manual_seed would, without a GPU, remember every call.)"""
    torch.default_generator.manual_seed(seed)
    if torch.device(world.device).type == "cuda":
        torch.cuda.manual_seed(seed)


def _finite(tensors: list[torch.Tensor]) -> bool:
    return bool(torch.stack([t.detach().sum().float() for t in tensors]).isfinite().all())


def _check_weights(task: Task, row: dict) -> None:
    """A finite loss can have gradients that are not: the weights they spoil must not become a checkpoint."""
    for name, module in task.modules.items():
        if not _finite([t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]):
            raise NotFinite(f"a weight of the {name}").at(row)


def _not_finite_rows(config: LoopConfig, step: Step, losses: list[torch.Tensor], world: World) -> tuple[int, ...]:
    """Rows of the split whose losses are not finite, of all ranks."""
    batching = Batching(config.batch, config.micro_batches)
    found = torch.zeros(2, config.batch, dtype=torch.float64)  # by place in the step: is it one, and its row
    for j, batch, each in zip(step.own, step.micro_batches, losses, strict=True):
        places = torch.from_numpy(batching.positions(step.number, j) - step.number * config.batch)
        found[0, places] = (~each.isfinite()).double().cpu()
        found[1, places] = torch.from_numpy(batch.rows).double()
    bad, rows = world.sum_(found.to(world.device)).cpu()
    return tuple(sorted({int(row) for row in rows[bad > 0]}))
