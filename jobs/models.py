"""Models of a registry: which versions there are, who is champion, and the way back."""

import os
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from jobs.command import absolute, console, execute, parse, say
from pipeline import registry, storage


@dataclass(frozen=True)
class Args:
    """list: models, or the versions of one. show: one version, or the champion. promote NAME VERSION: makes it the
    champion, by hand. rollback NAME: back to the champion before, and blocks the one that was. history NAME: who was
    champion when, and why. publish NAME RUN: a version of a run's best checkpoint. pin, unpin NAME VERSION: keep it.
    """

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WHAT")]
    """list, show, promote, rollback, history, publish, pin or unpin."""
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """Of the model."""
    which: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VERSION")] = ""
    """A version, champion, or for publish a RUN."""
    models: str = ""
    """The registry, local or s3://...; default: MILLSTREAM_MODELS. A nightly keeps its own in ROOT/models."""
    to: str | None = None
    """rollback: further back, to this version."""
    why: str = ""
    """A reason, which the history keeps."""
    unblock: bool = False
    """promote: although the version was rolled back once."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    if args.what not in _DOES:
        raise ValueError(f"{args.what!r}: {', '.join(_DOES)}")
    given = args.models or os.environ.get("MILLSTREAM_MODELS", "")
    if not given:
        raise ValueError("say where the models are: --models s3://bucket/models, or MILLSTREAM_MODELS")
    root = absolute(given)
    if args.what == "list" and not args.name:
        return _models(root)
    if not args.name or (args.what in ("promote", "publish", "pin", "unpin") and not args.which):
        wanted = {"publish": " RUN", "promote": " VERSION", "pin": " VERSION", "unpin": " VERSION"}.get(args.what, "")
        raise ValueError(f"millstream models {args.what} NAME{wanted}")
    if args.what != "publish" and args.name not in (there := registry.names(root)):
        raise ValueError(f"no model {args.name!r} in {root}: there are {', '.join(there) or 'none'}")
    return _DOES[args.what](root, args)


def _models(root: str) -> dict:
    table, found = Table("model", "champion", "since", "versions", box=None), {}
    for name in registry.names(root):
        now, versions = registry.champion(root, name), registry.versions(root, name)
        found[name] = {"champion": now.version, "since": now.time, "versions": len(versions)}
        table.add_row(name, now.version or "none", now.time[:19], str(len(versions)))
    console.print(table) if found else say(f"no models in {root}")
    return {"models": found}


def _list(root: str, args: Args) -> dict:
    now, kept = registry.champion(root, args.name), registry.pinned(root, args.name)
    table, rows = Table("version", "created", "accuracy", "night", "", box=None), []
    for info in registry.versions(root, args.name):
        version, numbers = info["version"], info.get("metrics", {})
        marks = [mark for mark, true in (("champion", version == now.version), ("previous", version == now.previous),
                 ("blocked", version in now.blocked), ("pinned", version in kept)) if true]  # fmt: skip
        accuracy, night = numbers.get("accuracy"), info.get("lineage", {}).get("night", "")
        rows.append(
            {"version": version, "created": info["created"], "metrics": numbers, "night": night, "marks": marks}
        )
        table.add_row(
            version, info["created"][:19], "" if accuracy is None else f"{accuracy:.4f}", night, " ".join(marks)
        )
    console.print(table)
    return {"name": args.name, "champion": now.version, "versions": rows}


def _show(root: str, args: Args) -> dict:
    path = registry.resolve(f"models:{root}/{args.name}@{args.which or registry.CHAMPION}")
    info = registry.describe(path)
    facts = info["model"]["facts"]
    say(f"{info['version']} of {args.name}, published {info['created']}: {path}")
    say(f"{info['model']['kind']} {info['model']['task']['model']}, {facts['image_size']} px, "
        f"{len(facts['classes'])} classes, {sum(f['size'] for f in info['files'].values()) / 1e6:.1f} MB")  # fmt: skip
    for group in ("metrics", "lineage"):
        for name, value in info.get(group, {}).items():
            say(f"  {name}: {value}")
    return info | {"path": path}


def _promote(root: str, args: Args) -> dict:
    new = registry.promote(root, args.name, args.which, registry.champion(root, args.name), rule="hand",
                           why=args.why or "by hand", unblock=args.unblock)  # fmt: skip
    say(f"{new.version} is the champion of {args.name} (epoch {new.epoch}), {new.previous or 'nobody'} was before")
    return new.entry()


def _rollback(root: str, args: Args) -> dict:
    new = registry.rollback(root, args.name, args.why or "rolled back by hand", args.to)
    say(f"{new.version} is the champion of {args.name} again (epoch {new.epoch}); blocked: {', '.join(new.blocked)}")
    return new.entry() | {"blocked": list(new.blocked)}


def _history(root: str, args: Args) -> dict:
    entries = registry.history(root, args.name)
    table = Table("epoch", "", "version", "time", "by", "why", box=None)
    for entry in entries:
        table.add_row(
            str(entry["epoch"]), entry["action"], entry["version"], entry["time"][:19], entry["by"], entry["why"]
        )
    console.print(table)
    return {"name": args.name, "history": entries}


def _publish(root: str, args: Args) -> dict:
    from pipeline.training import weights  # torch: a rollback does not wait for it
    from pipeline.training.rank import restored
    from pipeline.training.run import open_run

    opened = open_run(absolute(args.which))
    task, manifest = restored(opened)
    lineage = {"data": opened.data, "generations": list(opened.generations), "run": opened.path, "init": opened.init,
               "checkpoint": manifest.name, "millstream": opened.about()["millstream"]}  # fmt: skip
    config = opened.config.task
    version = registry.publish(
        root, args.name, weights.files(config, task), weights.described(config, opened.facts, opened.config.augment),
        {"metrics": manifest.validation, "lineage": lineage},
    )  # fmt: skip
    say(f"{args.name} has version {version}, of {storage.name(opened.path)} at {manifest.name}; nobody is promoted")
    return {"name": args.name, "version": version}


def _pin(root: str, args: Args) -> dict:
    registry.pin(root, args.name, args.which, args.why or "pinned by hand")
    return {"name": args.name, "pinned": registry.pinned(root, args.name)}


def _unpin(root: str, args: Args) -> dict:
    registry.unpin(root, args.name, args.which)
    return {"name": args.name, "pinned": registry.pinned(root, args.name)}


_DOES = {"list": _list, "show": _show, "promote": _promote, "rollback": _rollback, "history": _history}
_DOES |= {"publish": _publish, "pin": _pin, "unpin": _unpin}


def main(argv: list[str]) -> int:
    args = parse(Args, "models", argv)
    return execute(lambda: run(args), args.json)
