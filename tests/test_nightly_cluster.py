"""Four nights on a real cluster with a real store, submitted as a CronJob would: each ends as it should."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from ray_head import ROOT, TOKEN, RayHead

from jobs import demo_nights
from pipeline import registry, storage
from pipeline.nightly import record
from pipeline.shards import index

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONFIG = {
    "name": "digits",
    "preset": "digits_cnn",
    "train": {"validate_every": 2000, "ema_half_life": 500},
    "shard": {"format": "png", "samples_per_shard": 200},
    "samples": 6000,
    "holdout": "test",
    "schedule": "0 2 * * *",
    "timezone": "Europe/Berlin",
    "resources": {"workers": 2},
}


def test_four_nights_on_a_cluster_end_as_they_should(s3, tmp_path):
    place = s3.fresh()
    path, root, raw = (storage.join(place, name) for name in ("nightly.yaml", "lake", "raw"))
    storage.write(path, yaml.safe_dump(CONFIG | {"source": raw, "root": root}).encode())

    def submit(head: RayHead, tick: str) -> tuple[dict, str]:
        command = [sys.executable, "-m", "jobs", "submit", "--json", "--store", storage.join(place, "jobs")]
        command += ["--address", head.address, "--", "nightly", path, "--tick", tick]
        env = os.environ | {"RAY_AUTH_TOKEN": TOKEN, "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        assert json.loads(done.stdout)["exit_code"] == 0
        return record.read(root, tick), done.stderr

    with RayHead(env=s3.env) as head:
        ended = []
        for number in range(1, 5):
            demo_nights.arrive(raw, number)
            doc, said = submit(head, f"2026-11-{number:02d}T0100Z")
            print(said)
            ended.append(doc)
        again, said = submit(head, "2026-11-04T0100Z")
    assert [doc["outcome"] for doc in ended] == ["promoted", "promoted", "rejected", "skipped"]
    assert "skipped before" in said
    assert again == ended[-1]
    first, second, third, fourth = (doc["stages"] for doc in ended)
    assert first["score"]["decision"]["rule"] == "floors"
    assert second["score"]["decision"]["rule"] == "superior"
    assert second["train"]["init"] == registry.version_path(f"{root}/models", "digits", first["promote"]["version"])
    assert third["score"]["decision"]["numbers"]["p_value"] > 0.5
    assert fourth.keys() == {"fresh"}
    now = registry.champion(f"{root}/models", "digits")
    assert (now.version, now.previous) == (second["promote"]["version"], first["promote"]["version"])
    assert len(index.load(f"{root}/data").info["generations"]) == 3
    assert storage.exists(f"{root}/nights/index.html")
