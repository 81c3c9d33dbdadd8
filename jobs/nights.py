"""Bringing a night to its end from a command: Ray only once a stage has work for it; Ctrl-C saves."""

import contextlib

from cluster.session import ray_session
from jobs import presets
from jobs.command import asked_to_stop, say, shards_done, training_rows
from pipeline import lease
from pipeline.nightly import stages
from pipeline.nightly.aftermath import after
from pipeline.nightly.config import NightConfig, changed
from pipeline.nightly.night import Night, Stopped, run


def bring_to_end(config: NightConfig, tick: str, address: str | None, force: bool = False) -> dict:
    """{tick, outcome, reason, ...} of `night.run`, with the `exit_code` of a night that did not end well. outcome None:
    another process is at work on it, or it was stopped.
    """
    train = changed(presets.get(config.preset), config.train)
    with contextlib.ExitStack() as stack:
        there = []

        def ray() -> None:
            if not there:
                there.append(stack.enter_context(ray_session(config.resources.most, address)))
                stop.listen()  # Ray took SIGTERM for itself when it started, and would end us with its session

        stop = stack.enter_context(asked_to_stop())
        night = Night(config, train, tick, ray, say, training_rows(), shards_done(), stop, force)
        try:
            result = run(night, stages.STAGES, after=after)
        except lease.Held as held:
            say(f"another process is at work on it: {held}")
            return {"tick": tick, "outcome": None, "reason": str(held)}
        except Stopped:
            say("stopped, all saved: the same command goes on from there")
            return {"tick": tick, "outcome": None, "reason": "stopped", "exit_code": stop.exit_code}
    say(f"{tick}: {result['outcome']}{' before' if result['done'] else ''}: {result['reason']}")
    if result["outcome"] == "failed":
        return result | {"exit_code": 2 if result.get("mistake") else 1}
    return result
