"""How long a run is, and when it is validated and saved: everything counted in samples, but for one clock."""

import re
import time
from dataclasses import dataclass

_SECONDS = re.compile(r"(\d+(?:\.\d+)?)s")


@dataclass(frozen=True)
class LoopConfig:
    """How long, in what portions, and what is kept. Fixed for a run, but for `checkpoint_every`, `keep` and
    `skip_nonfinite`."""

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
    checkpoint_every: int | str = "600s"
    """Samples between further checkpoints, or seconds (600s); 0: only after validations."""
    keep: int = 2
    """Newest checkpoints kept, besides the best and those that are pinned."""
    skip_nonfinite: int = 0
    """Steps in all whose loss or gradient may be infinite or not a number: they are skipped. One more stops the run."""
    patience: int = 0
    """Early stopping: the run ends after so many validations in a row without a better accuracy; 0: never early."""

    def __post_init__(self):
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs {self.epochs} must be above 0, and an end")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: a whole number from 0 below 2**63")
        if min(self.validate_every, self.skip_nonfinite, self.patience) < 0 or self.keep < 1:
            raise ValueError(
                f"validate_every {self.validate_every}, skip_nonfinite {self.skip_nonfinite} and patience "
                f"{self.patience} cannot be negative, keep {self.keep} must be at least 1"
            )
        Saving(self)


class Saving:
    """When checkpoints come that no validation brings: every `samples`, or when `due` says so; 0 and never."""

    def __init__(self, config: LoopConfig):
        every, seconds = config.checkpoint_every, _SECONDS.fullmatch(str(config.checkpoint_every))
        if not seconds and not str(every).isdigit():
            raise ValueError(f"checkpoint_every {every!r}: a number of samples, seconds such as 600s, or 0 for never")
        self.samples = 0 if seconds else int(every)
        self._seconds, self._last = float(seconds[1]) if seconds else float("inf"), time.monotonic()

    def due(self) -> bool:
        """Whether the seconds since the last checkpoint, whatever brought it, are over."""
        return time.monotonic() - self._last >= self._seconds

    def done(self) -> None:
        self._last = time.monotonic()


def total_steps(config: LoopConfig, epoch: int) -> int:
    """Steps of a run: as many as draw at least epochs x epoch samples (up to batch - 1 more are drawn)."""
    return max(1, -(-round(config.epochs * epoch) // config.batch))


def between_snapshots(samples: int, snapshots: int) -> int:
    """Samples from one snapshot to the next, of so many in a run of `samples`; 0: there are none."""
    return -(-samples // snapshots) if snapshots else 0


def passes(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never if `every` is 0."""
    return every > 0 and after // every > before // every
