"""A scheduler for the race of nights: `python scheduler.py ROOT LOG TTL TICKS`. Goes through the ticks in order, with
stages that only take time and the real promotion, and leaves a line in LOG for each thing that happened to it.
"""

import random
import sys
import time

from pipeline import lease, registry
from pipeline.nightly import record, stages
from pipeline.nightly.config import NightConfig
from pipeline.nightly.night import Night, Superseded, run
from pipeline.storage import Conflict


def expected(number: int) -> str:
    return "skipped" if number % 7 == 3 else "rejected" if number % 5 == 2 else "promoted"


def name(number: int) -> str:
    return f"tick-{number:04d}"


def published(config: NightConfig, tick: str) -> str:
    return registry.publish(config.registry, config.name, {"weights": tick.encode()}, {"tick": tick}, {})


def _stage(kind: str, result) -> tuple:
    def stage(night: Night) -> dict:
        time.sleep(random.uniform(0, 0.05))
        return result(night)

    return kind, stage


def _ending(when: str, night: Night) -> dict:
    number = int(night.tick.rpartition("-")[2])
    return {"outcome": when, "reason": "so it is"} if expected(number) == when else {}


DECISION = {"rule": "superior", "reason": "so it is"}
STAGES = [
    _stage("fresh", lambda night: _ending("skipped", night)),
    _stage("data", lambda night: {"generations": [0]}),
    _stage("train", lambda night: {}),
    _stage(
        "score", lambda night: {"champion": night.champion.version, "decision": DECISION} | _ending("rejected", night)
    ),
    _stage("publish", lambda night: {"version": published(night.config, night.tick)}),
    ("promote", stages.promote),
]


def main(root: str, log: str, ttl: str, ticks: str) -> None:
    config = NightConfig("race", "nowhere", root, "none")
    with open(log, "a", buffering=1) as said:
        for number in range(int(ticks)):
            while True:
                try:
                    done = run(Night(config, None, name(number)), STAGES, ttl=float(ttl))
                    if not done["done"] and done["outcome"] != "failed":
                        said.write(f"committed {number}\n")
                    if done["outcome"] == "failed":
                        said.write(f"failed {number} {done['reason']}\n")
                    if done["outcome"] in record.FINAL:
                        break
                except lease.Held:
                    pass
                except (Superseded, lease.Lost, Conflict) as fenced:
                    said.write(f"fenced {number} {type(fenced).__name__}\n")
                except Exception as error:
                    said.write(f"broken {number} {type(error).__name__}: {error}\n")
                time.sleep(random.uniform(0, 0.1))


if __name__ == "__main__":
    main(*sys.argv[1:])
