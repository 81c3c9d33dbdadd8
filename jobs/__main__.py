"""millstream: raw images in; tar shards and trained models out. One laptop or a GPU cluster, the same commands."""

import difflib
import importlib
import sys

VERBS = {
    "shard": "raw images -> webdataset tar shards and an index",
    "inspect": "what a dataset holds; --preview draws it",
    "verify": "read a dataset again, compare it with its checksums, repair it",
    "audit": "prove that every world size draws the same samples, each once an epoch; check what a run drew",
    "train": "train a preset on a dataset; the same command again resumes",
    "checkpoints": "list a run's checkpoints, and pin those that must stay",
    "average": "choose, after training, how long an average of the weights is best",
    "evaluate": "score a run's best checkpoint on a split",
    "sample": "draw images from a trained GAN",
    "nightly": "one night: new data, a challenger, promoted if it is better",
    "models": "list, show, promote, rollback, history of published models",
    "schedule": "run a nightly by its schedule, or print cron, systemd or Kubernetes files for it",
    "demo": "all of it on scikit-learn's digits, with a report page",
    "submit": "run any verb on a Ray cluster, and end as it ends",
    "job": "status, logs, stop, wait, list of what was submitted",
    "cluster": "what a cluster file would make and cost (plan), and what is wrong with it (lint)",
    "bench": "measure sharding, loading and training against the bare machine",
}


def main(argv: list[str] | None = None) -> int:
    """Runs `millstream VERB ...`; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"millstream {version('millstream')}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}"
        print(f"error: no verb {verb!r}: {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"jobs.{verb}").main(rest)


def _usage() -> str:
    lines = [f"  {verb:11} {what}" for verb, what in VERBS.items()]
    return "\n".join([__doc__, "", "usage: millstream VERB ... (millstream VERB --help says more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
