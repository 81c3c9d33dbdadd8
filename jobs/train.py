"""Trains a preset, or FILE.py:NAME, on a dataset. The same command again resumes where the run stands."""

import contextlib
from dataclasses import asdict, dataclass, field, replace

import tyro
from rich.table import Table

from cluster.session import ray_session
from jobs import presets
from jobs.command import absolute, absolute_model, asked_to_stop, console, execute, fit_with_progress, parse, say
from pipeline.loading.selection import choose
from pipeline.shards import index
from pipeline.training import fit
from pipeline.training.cadence import total_steps
from pipeline.training.resources import Resources
from pipeline.training.run import TrainConfig, start


@dataclass(frozen=True)
class Args:
    """Train a preset on a dataset. The same command again resumes where the run stands, exactly."""

    data: str
    """What `millstream shard` wrote, local or s3://..."""
    out: str
    """RUN: the run's directory, local or s3://... It is the record: config, metrics, checkpoints."""
    config: TrainConfig
    resources: Resources = field(default_factory=Resources)
    address: str | None = None
    """A running Ray cluster; default: RAY_ADDRESS, else a Ray of our own on this machine."""
    dry_run: bool = False
    """Print the resolved configuration, and train nothing."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args, preset: str) -> dict:
    """{run, samples_seen, epochs, checkpoint, metrics, ...}"""
    data, out, workers = absolute(args.data), absolute(args.out), args.resources.workers
    config = replace(args.config, init=absolute_model(args.config.init))
    if args.dry_run:
        samples = len(choose(index.load(data).split("train"), config.selection, config.loop.seed).split)
        steps = total_steps(config.loop, samples)
        say(f"{preset} on {args.data} ({samples:,} samples) -> {args.out}: {steps:,} steps")
        return {"preset": preset, "data": data, "run": out, "steps": steps, "config": asdict(config)}
    opened = start(out, preset, config, data, workers)
    here = args.resources.most == 0 or fit.finished(opened)
    # Ray first: it takes SIGTERM for itself when it starts.
    with contextlib.nullcontext() if here else ray_session(args.resources.most, args.address), asked_to_stop() as stop:
        result = fit_with_progress(opened, args.resources, stop)
    if result["stopped"]:
        say(f"stopped at {result['samples_seen']:,} samples, all saved: the same command again goes on from there")
        return result | {"exit_code": stop.exit_code}
    if result["early_stop"]:
        say(f"stopped early: no better accuracy in {config.loop.patience} validations")
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items() if name != "epoch")
    say(f"{'trained already: ' if result['done'] else ''}{result['samples_seen']:,} samples seen, {numbers}")
    if times := result["ledger"]:
        lost = {
            kind: s for kind, s in times["seconds"].items() if kind not in ("compute", "communication") and s >= 0.1
        }
        said = ", ".join(f"{kind} {s:.1f} s" for kind, s in sorted(lost.items(), key=lambda item: -item[1]))
        say(f"goodput {times['goodput']:.0%} of {times['wall']:.0f} s ({said or 'nothing else to speak of'})")
    say(f"checkpoint: {result['checkpoint']}")
    return result


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        say("usage: millstream train PRESET --data DATASET --out RUN [any field of the preset]\n")
        table = Table("preset", "what to expect", box=None)
        for name, preset in presets.PRESETS.items():
            table.add_row(name, " ".join(preset.__doc__.split()))
        console.print(table)
        say("\nmillstream train PRESET --help lists the fields with the preset's values.")
        say("Of your own: train ./mine.py:my_run (a function in a file), and --model ./mine.py:Net with any preset.")
        return 0 if argv and argv[0] in ("-h", "--help") else 2

    def parsed() -> Args:
        default = Args(data=tyro.MISSING, out=tyro.MISSING, config=presets.get(argv[0]))
        return parse(Args, f"train {argv[0]}", argv[1:], default)

    return execute(lambda: run(parsed(), argv[0]), "--json" in argv)
