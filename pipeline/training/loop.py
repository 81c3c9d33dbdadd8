"""The training loop, top to bottom. It knows no Ray: ranks are a World, checkpoints a Saver.

for each step, for each phase:
    for each of this rank's micro-batches: loss -> backward            gradients add up, scaled by 1/B
    one sum over the ranks of [gradients, logged numbers, running statistics; the first time, the samples' digest]
    optimizer step
then, when due: validate, checkpoint
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import draw
from pipeline.loading import audit
from pipeline.loading.order import Batching
from pipeline.loading.steps import Step
from pipeline.training import optim
from pipeline.training.checkpoint import Saver
from pipeline.training.optim import OptimConfig
from pipeline.training.tasks import Phase, Task
from pipeline.training.world import World

_STEP = draw.text_bits("loop/step")


@dataclass(frozen=True)
class LoopConfig:
    """How long, in what portions, and what is kept. Fixed for a run, but for `checkpoint_every` and `keep`."""

    epochs: float = 10.0
    """Passes over the training split; fractions allowed."""
    batch: int = 128
    """Samples in a step, over all workers."""
    micro_batches: int = 0
    """Parts of a step that are computed on their own; a power of two, and workers must divide it. 0: the power of two
    at or above the workers asked for, at least 2."""
    seed: int = 0
    """Decides weights, order and augmentation."""
    validate_every: int = 0
    """Samples between validations, each followed by a checkpoint; 0: an epoch."""
    checkpoint_every: int = 0
    """Samples between further checkpoints; 0: only after validations."""
    keep: int = 2
    """Newest checkpoints kept, besides the best."""

    def __post_init__(self):
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs {self.epochs} must be above 0, and an end")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: a whole number from 0 below 2**63")
        if self.validate_every < 0 or self.checkpoint_every < 0 or self.keep < 1:
            raise ValueError(
                f"validate_every {self.validate_every} and checkpoint_every {self.checkpoint_every} cannot be "
                f"negative, keep {self.keep} must be at least 1"
            )


def train(
    config: LoopConfig,
    optim_config: OptimConfig,
    task: Task,
    steps: Iterable[Step],
    epoch: int,
    world: World,
    validate: Callable[[], dict],
    saver: Saver | None,
    report: Callable[[dict], None],
) -> dict:
    """Trains `task` on `steps`, which begin where the run stands, up to the run's last; returns the last row logged.

    `epoch`: samples in one. `validate()` runs on every rank and gives numbers, or {}. `saver`: rank 0's, None on
    others. `report(row)` sees every row. Raises FloatingPointError when a loss is not finite.
    """
    total = total_steps(config, epoch)
    validate_every = config.validate_every or epoch
    rows, row = [], {}
    for step in steps:
        if step.number >= total:
            break
        seen = step.number * config.batch
        rate = optim.learning_rate(optim_config, seen, total * config.batch, epoch)
        numbers, drawn = {}, _drawn(config, step, epoch, world)
        for number, phase in enumerate(task.phases):
            optim.set_lr(phase.optimizer, rate)
            numbers |= take_phase(config, optim_config, number, phase, step, world, () if number else (drawn,))
        task.after_step(config.batch)
        before, seen = seen, seen + config.batch
        row = {"step": step.number + 1, "samples": seen, "epoch": seen / epoch, "lr": rate, **numbers}
        row |= _drawn_fields(drawn)
        row["time"] = time.time()
        _check_finite(row)
        ending = step.number + 1 == total
        validating = ending or _passes(validate_every, before, seen)
        saving = validating or _passes(config.checkpoint_every, before, seen)
        if saving:
            _check_weights(task, row)  # on every rank, so that none goes on alone
        validation = validate() if validating else {}
        row |= {f"val_{name}": value for name, value in validation.items()}
        rows.append(row)
        report(row)
        if saver and saving:
            saver.save({"task": task.state(), "samples": seen}, seen, rows, validation)
            rows = []
        if ending:
            break
    if saver:
        saver.wait()
    return row


def total_steps(config: LoopConfig, epoch: int) -> int:
    """Steps of a run: as many as draw at least epochs x epoch samples (up to batch - 1 more are drawn)."""
    return max(1, -(-round(config.epochs * epoch) // config.batch))


def _passes(every: int, before: int, after: int) -> bool:
    return every > 0 and after // every > before // every


def _drawn(config: LoopConfig, step: Step, epoch: int, world: World) -> torch.Tensor:
    """This rank's part of what a row says of the samples: of their digest, and how many were set aside. float32 (5,)"""
    batching = Batching(config.batch, config.micro_batches)
    epochs = np.concatenate([batching.positions(step.number, j) // epoch for j in step.own])
    rows = np.concatenate([batch.rows for batch in step.micro_batches])
    kept = np.concatenate([batch.weights.cpu().numpy() for batch in step.micro_batches]) > 0  # else it is a stand-in
    parts = audit.digest_parts(epochs[kept], rows[kept])
    return torch.tensor([*parts.tolist(), int((~kept).sum())], dtype=torch.float32, device=world.device)


def _drawn_fields(drawn: torch.Tensor) -> dict:
    """`samples_digest`, which `audit` compares with the order, and `set_aside` where samples were."""
    *parts, set_aside = (int(number) for number in drawn.tolist())
    return {"samples_digest": audit.written(audit.digest(parts))} | ({"set_aside": set_aside} if set_aside else {})


def take_phase(
    config: LoopConfig,
    optim_config: OptimConfig,
    number: int,
    phase: Phase,
    step: Step,
    world: World,
    beside: tuple[torch.Tensor, ...] = (),
) -> dict[str, float]:
    """One phase of one step: gradients over all micro-batches of all ranks, one optimiser step. Returns its numbers.

    `beside`: float32 tensors that are summed over the ranks as well, in place.
    """
    parameters = list(phase.module.parameters())
    statistics = [b for b in phase.module.buffers() if b.is_floating_point()]  # batch norm's running ones
    counters = [b for b in phase.module.buffers() if not b.is_floating_point()]  # its number of batches
    start, counted = [b.clone() for b in statistics], [b.clone() for b in counters]
    drift = [torch.zeros_like(b) for b in statistics]
    phase.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    for j, batch in zip(step.own, step.micro_batches, strict=True):
        _seed(int(draw.bits(_STEP, config.seed, step.number, number, j) >> np.uint64(1)), world)
        for now, old in zip(counters, counted, strict=True):
            now.copy_(old)  # so that a step counts once, however many micro-batches this rank has
        loss, numbers = phase.loss(batch)
        (loss / config.batch).backward(inputs=parameters)
        sums = {name: sums.get(name, 0) + value for name, value in numbers.items()}
        # Every micro-batch starts from the step's statistics, and their changes are averaged: so ranks do not show.
        for now, old, change in zip(statistics, start, drift, strict=True):
            change += now - old
            now.copy_(old)
    gradients = [p.grad for p in parameters]
    logged = torch.stack([value.detach().float() for value in sums.values()])
    if world.size > 1:
        _sum_flat(world, [*gradients, *drift, logged, *beside])
    for now, old, change in zip(statistics, start, drift, strict=True):
        now.copy_(old + change / config.micro_batches)
    optim.penalize(phase.module, optim_config.l1, optim_config.l2)
    phase.optimizer.step()
    return dict(zip(sums, (logged / config.batch).tolist(), strict=True))


def _seed(seed: int, world: World) -> None:
    """Seeds what is drawn on this rank's device. (torch.manual_seed would, without a GPU, remember every call.)"""
    torch.default_generator.manual_seed(seed)
    if torch.device(world.device).type == "cuda":
        torch.cuda.manual_seed(seed)


def _sum_flat(world: World, tensors: list[torch.Tensor]) -> None:
    """One all-reduce for many tensors: on small models the number of calls is what costs."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    world.sum_(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _check_finite(row: dict) -> None:
    bad = [name for name, value in row.items() if isinstance(value, float) and not np.isfinite(value)]
    if bad:
        raise _not_finite(", ".join(bad), row)


def _check_weights(task: Task, row: dict) -> None:
    """A finite loss can have gradients that are not: the weights they spoil must not become a checkpoint."""
    for name, module in task.modules.items():
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        if not torch.stack([t.detach().sum().float() for t in tensors]).isfinite().all():
            raise _not_finite(f"a weight of the {name}", row)


def _not_finite(what: str, row: dict) -> FloatingPointError:
    return FloatingPointError(
        f"{what} is not finite at step {row['step']} ({row['samples']} samples): "
        f"lower --lr, or look at the samples of that step; the last checkpoint is untouched"
    )
