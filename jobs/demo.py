"""The whole road on scikit-learn's digits: raw images, shards, a classifier, a GAN, and one page about them."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.table import Table

from cluster.session import ray_session
from jobs import demo_nights, presets, report_page
from jobs.command import absolute, console, execute, fit_with_progress, parse, say
from pipeline import storage
from pipeline.evaluation import report
from pipeline.shards import build
from pipeline.shards.plan import Recipe
from pipeline.sources.digits import digit_images
from pipeline.training import fit
from pipeline.training.checkpoint import read_metrics
from pipeline.training.rank import draw_classes
from pipeline.training.resources import Resources
from pipeline.training.run import Run, start


@dataclass(frozen=True)
class Args:
    """Run the whole road on scikit-learn's digits, in minutes, without a network; finished stages are not redone."""

    out: str = "millstream-demo"
    """Where everything goes, a local folder or s3://..."""
    nightly: bool = False
    """Four nights of retraining instead: a first model, better data, worse data, no new data."""
    resources: Resources = field(default_factory=lambda: Resources(workers=2))
    address: str | None = None
    """A running Ray cluster; default: RAY_ADDRESS, else a Ray of our own on this machine."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{accuracy, report, seconds, ...}; of --nightly {nights, champion, page}"""
    if args.nightly:
        return demo_nights.run(absolute(args.out), args.resources, args.address)
    started, out = time.monotonic(), absolute(args.out)
    raw, data, cnn, gan = (storage.join(out, name) for name in ("raw", "shards", "cnn", "gan"))
    write_raw(raw)
    with contextlib.ExitStack() as stack:

        def ray() -> None:  # only once a stage has work for it
            if workers:
                stack.enter_context(ray_session(workers, args.address))

        workers, source, recipe = args.resources.most, f"folder:{raw}", Recipe(format="png", samples_per_shard=200)
        say(f"2. shards: {data}")
        if not build.describe(source, data, recipe)["done"]:
            ray()
        made = build.build(source, data, recipe, workers)
        say(f"   {_found(made['done'])}{made['samples']:,} samples in {made['shards']} shards")
        say(f"3. classifier: {cnn}")
        classifier, trained = _train(cnn, "digits_cnn", data, args.resources, ray)
        say("4. evaluation on the held-out test split")
        scores = report_page.standing(classifier, "test")
        page = storage.join(out, "report.html")
        known = scores is not None and storage.exists(page)
        if not known:
            scores, answers = report_page.evaluate(classifier, data, "test", Resources(workers=0))
        say(f"   {_found(known)}accuracy {scores['accuracy']:.4f} over {scores['samples']} images")
        say(f"5. GAN: {gan}")
        generator, drawn = _train(gan, "digits_gan", data, args.resources, ray)
    if not (known and drawn["done"]):
        if known:  # the page was made, but not with this GAN
            answers, _ = fit.evaluate(classifier, data, "test", Resources(workers=0))
        sections = report_page.classifier(classifier, data, "test", scores, answers)
        images, checkpoint = draw_classes(generator, 80)
        sections[6:6] = [
            ("GAN samples", report.image_grid(images, f"averaged generator, {checkpoint}, a class a row", columns=8)),
            ("GAN training", report_page.curves(read_metrics(gan))),
            *report_page.goodput(generator, "GAN goodput"),
        ]
        html = report.page("Millstream demo", "scikit-learn's digits, from files to models", sections)
        storage.write(page, html.encode())
    seconds = time.monotonic() - started
    _print_table(scores, made, trained, drawn, seconds)
    say(f"6. report: {page}")
    return {
        "accuracy": scores["accuracy"],
        "report": page,
        "seconds": seconds,
        "samples": made["samples"],
        "done": made["done"] and trained["done"] and known and drawn["done"],
        "runs": [cnn, gan],
    }


def _train(path: str, preset: str, data: str, resources: Resources, ray: Callable[[], None]) -> tuple[Run, dict]:
    opened = start(path, preset, presets.get(preset), data, resources.workers)
    if not fit.finished(opened):
        ray()
    result = fit_with_progress(opened, resources)
    say(f"   {_found(result['done'])}{result['samples_seen']:,} samples seen")
    return opened, result


def write_raw(raw: str) -> None:
    """The digits as PNG files, a fifth held out: RAW/train/7/0042.png, RAW/test/...; a marker written last."""
    marker = storage.join(raw, ".complete")
    say(f"1. raw images: {raw}")
    if storage.exists(marker):
        say("   found finished: 1,797 files")
        return
    for number, (image, label) in enumerate(zip(*digit_images(), strict=True)):
        split = "test" if number % 5 == 0 else "train"
        storage.write(storage.join(raw, split, str(label), f"{number:04d}.png"), report.png(image))
    storage.write(marker, b"")
    say("   1,797 files by split and class")


def _found(done: bool) -> str:
    return "found finished: " if done else ""


def _print_table(scores: dict, made: dict, trained: dict, drawn: dict, seconds: float) -> None:
    table = Table("stage", "result", box=None)
    table.add_row("shards", f"{made['samples']:,} samples, {made['rejected']} rejected, {made['shards']} shards")
    table.add_row("classifier", f"{trained['samples_seen']:,} samples seen in {trained['epochs']:.1f} epochs")
    table.add_row("held-out accuracy", f"{scores['accuracy']:.4f} over {scores['samples']} images")
    table.add_row("GAN", f"{drawn['samples_seen']:,} samples seen in {drawn['epochs']:.1f} epochs")
    table.add_row("seconds", f"{seconds:.0f}")
    console.print(table)


def main(argv: list[str]) -> int:
    args = parse(Args, "demo", argv)
    return execute(lambda: run(args), args.json)
