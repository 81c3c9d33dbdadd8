"""Each trap in a cluster file is named, and nothing is found in a file that has none."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.lint import lint

ROOT = Path(__file__).parents[1]
OURS = [ROOT / "cluster/aws.yaml", ROOT / "cluster/gcp.yaml", *sorted((ROOT / "cluster/kuberay").glob("*.yaml"))]
AWS = {
    "cluster_name": "a",
    "max_workers": 4,
    "idle_timeout_minutes": 5,
    "provider": {
        "type": "aws",
        "region": "us-west-2",
        "cache_stopped_nodes": False,
    },
    "auth": {"ssh_user": "ubuntu"},
    "docker": {
        "image": "registry.example/m:1.0-ray2.60.0",
        "container_name": "ray",
        "run_options": ["--env RAY_AUTH_MODE=token", "--env RAY_JOB_STOP_WAIT_TIME_S=120"],
    },
    "head_node_type": "head",
    "available_node_types": {
        name: {
            "resources": {"CPU": 0} if name == "head" else {},
            "priority": priority,
            "node_config": {
                "InstanceType": "g6.xlarge",
                "ImageId": "ami-0123456789abcdef0",
                "SecurityGroupIds": ["sg-0123456789abcdef0"],
                "IamInstanceProfile": {"Name": "millstream"},
                "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
                "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 100, "Encrypted": True}}],
            }
            | ({"InstanceMarketOptions": {"MarketType": "spot"}} if name == "spot" else {}),
        }
        for name, priority in (("head", 0), ("spot", 10), ("demand", 1))
    },
    "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
    "setup_commands": [],
    "head_start_ray_commands": ["ray start --head --dashboard-host=127.0.0.1"],
    "worker_start_ray_commands": ["ray start --address=$RAY_HEAD_IP:6379", "python -m cluster.preemption &"],
}
GCP = copy.deepcopy(AWS) | {
    "provider": {"type": "gcp", "region": "us-west1", "availability_zone": "us-west1-a", "project_id": "p"}
}  # fmt: skip
for _name, _node in GCP["available_node_types"].items():
    _spot = {"provisioningModel": "SPOT"} if _name == "spot" else {}
    _node["resources"] = _node["resources"] or {"CPU": 4, "GPU": 1}
    _node["node_config"] = {
        "machineType": "g2-standard-4", "serviceAccounts": [{"email": "m@p.iam.gserviceaccount.com"}],
        "scheduling": {"onHostMaintenance": "TERMINATE"} | _spot,
    }  # fmt: skip
POD = {"containers": [{"name": "ray", "image": "registry.example/m:1.0-ray2.60.0"}]}
HOOK = {"preStop": {"exec": {"command": ["python", "-m", "cluster.preemption", "--now", "--deadline", "60"]}}}
CLUSTER = {
    "rayVersion": "2.60.0",
    "authOptions": {"mode": "token", "secretName": "ray-auth"},
    "enableInTreeAutoscaling": True,
    "headGroupSpec": {
        "rayStartParams": {"num-cpus": "0"},
        "template": {"spec": copy.deepcopy(POD)},
    },
    "workerGroupSpecs": [
        {
            "groupName": "gpu",
            "minReplicas": 0,
            "maxReplicas": 4,
            "rayStartParams": {},
            "template": {"spec": copy.deepcopy(POD) | {"terminationGracePeriodSeconds": 90}},
        }
    ],
}
CLUSTER["headGroupSpec"]["template"]["spec"]["containers"][0]["env"] = [
    {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"}
]
CLUSTER["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["lifecycle"] = HOOK
BUDGET = {
    "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "b"},
    "spec": {"minAvailable": 1, "selector": {"matchLabels": {"a": "b"}}},
}  # fmt: skip
RAYCLUSTER = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "c"}, "spec": CLUSTER}
RAYJOB = {
    "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "j"},
    "spec": {"entrypoint": "true", "shutdownAfterJobFinishes": True, "rayClusterSpec": copy.deepcopy(CLUSTER)},
}  # fmt: skip
RAYCRON = {
    "apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": {"name": "n"},
    "spec": {"schedule": "30 2 * * *", "timeZone": "Europe/Berlin", "jobTemplate": copy.deepcopy(RAYJOB["spec"])},
}  # fmt: skip
CRON = {
    "apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "n"},
    "spec": {
        "schedule": "30 2 * * *", "timeZone": "Europe/Berlin", "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 600,
        "jobTemplate": {"spec": {"template": {"spec": copy.deepcopy(POD) | {"restartPolicy": "Never"}}}},
    },
}  # fmt: skip
GOOD = {"aws": AWS, "gcp": GCP, "cluster": RAYCLUSTER, "job": RAYJOB, "raycron": RAYCRON, "cron": CRON}
GONE = object()
HEAD = "spec.headGroupSpec.template.spec"
GROUP = "spec.workerGroupSpecs.0"
# (good document, dotted path, new value, the one trap it makes)
TRAPS = [
    ("aws", "setup_commands", GONE, "nightly-wheel"),
    ("aws", "head_start_ray_commands", GONE, "open-dashboard"),
    ("aws", "head_start_ray_commands", ["ray start --head --dashboard-host 0.0.0.0"], "open-dashboard"),
    ("aws", "available_node_types.head.node_config.SecurityGroupIds", GONE, "open-ssh"),
    ("aws", "provider.security_group.IpPermissions", [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}], "open-ssh"),
    ("aws", "provider.security_group.IpPermissions", [{"Ipv6Ranges": [{"CidrIpv6": "::/0"}]}], "open-ssh"),
    ("aws", "available_node_types.head.node_config.IamInstanceProfile", GONE, "full-access-role"),
    ("aws", "available_node_types.spot.node_config.IamInstanceProfile", {"Name": "AmazonEC2FullAccess"},
     "full-access-role"),
    ("aws", "available_node_types.spot.node_config.MetadataOptions", GONE, "imds-v1"),
    ("aws", "available_node_types.spot.node_config.MetadataOptions.HttpPutResponseHopLimit", 1, "imds-hops"),
    ("aws", "available_node_types.head.node_config.BlockDeviceMappings.0.Ebs.Encrypted", False, "plain-disk"),
    ("aws", "available_node_types.head.node_config.BlockDeviceMappings", GONE, "plain-disk"),
    ("aws", "available_node_types.head.node_config.InstanceMarketOptions", {"MarketType": "spot"}, "spot-head"),
    ("aws", "available_node_types.demand.priority", 10, "no-fallback"),
    ("aws", "available_node_types.spot.min_workers", 1, "never-zero"),
    ("aws", "available_node_types.head.resources", {}, "work-on-head"),
    ("aws", "docker.run_options", ["--env RAY_AUTH_MODE=token"], "missing-grace"),
    ("aws", "docker.run_options.1", "--env RAY_JOB_STOP_WAIT_TIME_S=3", "missing-grace"),
    ("aws", "docker.run_options.0", "--init", "no-token"),
    ("aws", "docker.run_options.0", "--env RAY_AUTH_MODE=token --env A=AKIAIOSFODNN7EXAMPLE", "secret"),
    ("aws", "file_mounts", {}, "no-token"),
    ("aws", "worker_start_ray_commands", ["ray start"], "no-preemption-watcher"),
    ("aws", "docker.image", "rayproject/ray:latest", "floating-image"),
    ("aws", "docker.image", "rayproject/ray", "floating-image"),
    ("aws", "docker.image", "rayproject/ray:2.9.0-py311", "ray-version"),
    ("aws", "provider.cache_stopped_nodes", GONE, "paid-disks"),
    ("aws", "idle_timeout_minutes", 600, "idle-timeout"),
    ("aws", "max_wrokers", 4, "schema"),
    ("gcp", "available_node_types.demand.node_config.serviceAccounts.0.email", "1-compute@developer.google.com",
     "full-access-role"),
    ("aws", "available_node_types.demand.node_confg", {}, "schema"),
    ("gcp", "available_node_types.demand.node_config.scheduling", {}, "gpu-migration"),
    ("gcp", "available_node_types.demand.resources", {}, "no-resources"),
    ("gcp", "available_node_types.demand.node_config.serviceAccounts", GONE, "full-access-role"),
    ("gcp", "provider.cache_stopped_nodes", True, "paid-disks"),
    ("gcp", "worker_start_ray_commands", ["ray start"], "no-preemption-watcher"),
    ("cluster", "spec.authOptions", GONE, "no-token"),
    ("cluster", "spec.headGroupSpec.serviceType", "LoadBalancer", "open-dashboard"),
    ("cluster", "spec.headGroupSpec.rayStartParams", {}, "work-on-head"),
    ("cluster", "spec.enableInTreeAutoscaling", False, "never-zero"),
    ("cluster", "spec.rayVersion", "2.9.0", "ray-version"),
    ("cluster", "spec.enableInTreeAutoscalin", True, "schema"),
    ("cluster", "spec.headGroupSpec.template", GONE, "schema"),
    ("cluster", f"{HEAD}.containers.0.env", GONE, "missing-grace"),
    ("cluster", f"{HEAD}.hostNetwork", True, "host-network"),
    ("cluster", f"{HEAD}.containers.0.securityContext", {"privileged": True}, "privileged"),
    ("cluster", f"{HEAD}.containers.0.imagee", "x", "schema"),
    ("cluster", f"{HEAD}.containers.0.env.1", {"name": "WANDB_API_KEY", "value": "abc"}, "secret"),
    ("cluster", f"{HEAD}.containers.0.image", "registry.example/m", "floating-image"),
    ("cluster", f"{GROUP}.template.spec.terminationGracePeriodSeconds", GONE, "missing-grace"),
    ("cluster", f"{GROUP}.template.spec.terminationGracePeriodSeconds", 30, "missing-grace"),
    ("cluster", f"{GROUP}.template.spec.containers.0.lifecycle", GONE, "no-drain"),
    ("cluster", f"{GROUP}.minReplicas", 2, "never-zero"),
    ("cluster", f"{GROUP}.minReplicaz", 0, "schema"),
    ("cluster", "metadata.name", "x" * 54, "long-name"),
    ("cluster", "apiVersion", "ray.io/v1alpha1", "schema"),
    ("job", "metadata.name", "x" * 48, "long-name"),
    ("job", "spec.clusterSelector", {"a": "b"}, "schema"),
    ("job", "spec.shutdownAfterJobFinishes", GONE, "never-zero"),
    ("job", "spec.deletionStrategy", {"deletionRules": [{}]}, "schema"),
    ("job", "spec.runtimeEnvYAML", "env_vars: {HF_TOKEN: abc}", "secret"),
    ("job", "spec.runtimeEnvYAML", "a: [", "schema"),
    ("raycron", "spec.concurrencyPolicy", "Forbid", "schema"),
    ("raycron", "spec.schedule", "TZ=UTC 0 2 * * *", "no-time-zone"),
    ("raycron", "metadata.name", "x" * 37, "long-name"),
    ("cron", "spec.concurrencyPolicy", GONE, "overlap"),
    ("cron", "spec.startingDeadlineSeconds", GONE, "missed-ticks"),
    ("cron", "spec.timeZone", GONE, "no-time-zone"),
    ("cron", "spec.jobTemplate.spec.template.spec.containers.0.image", "m:latest", "floating-image"),
    ("cron", "spec.jobTemplat", {}, "schema"),
]  # fmt: skip


def changed(document: dict, path: str, value) -> dict:
    out = copy.deepcopy(document)
    *way, last = path.split(".")
    node = out
    for step in way:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    if isinstance(node, list):
        node[int(last) : int(last) + 1] = [value]
    elif value is GONE:
        del node[last]
    else:
        node[last] = value
    return out


def written(tmp_path, *documents: dict) -> list[str]:
    (tmp_path / "file.yaml").write_text(yaml.safe_dump_all(documents))
    return [str(tmp_path / "file.yaml")]


def test_the_files_we_ship_have_no_trap():
    assert len(OURS) >= 6
    assert lint(list(map(str, OURS))) == []


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_has_none(tmp_path, name):
    assert lint(written(tmp_path, GOOD[name], *([BUDGET] if name in ("cluster", "job") else []))) == []


@pytest.mark.parametrize(("name", "path", "value", "trap"), TRAPS)
def test_each_trap_is_named_and_nothing_else(tmp_path, name, path, value, trap):
    broken = changed(GOOD[name], path, value)
    found = lint(written(tmp_path, broken, *([BUDGET] if name in ("cluster", "job") else [])))
    assert {finding.trap for finding in found} == {trap}, [str(finding) for finding in found]
    assert all("\n" not in str(finding) for finding in found)


def test_roles_services_and_missing_budgets(tmp_path):
    kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "r"}}
    everything = kind | {"kind": "ClusterRole", "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}
    admin = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    bound = kind | {"kind": "ClusterRoleBinding", "roleRef": admin}
    door = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}
    door["spec"] = {"type": "LoadBalancer", "ports": [{"port": 8265}]}
    for document, trap in (
        (everything, "full-access-role"), (bound, "full-access-role"), (door, "open-dashboard"),
        (RAYCLUSTER, "no-disruption-budget"), ({"apiVersion": "v1", "kind": "Pood"}, "schema"),
    ):  # fmt: skip
        assert [finding.trap for finding in lint(written(tmp_path, document))] == [trap]


def test_crds_close_what_the_built_in_rules_leave_open(tmp_path):
    size = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"a": {"type": "string"}}}
    inside = {"type": "object", "properties": {"size": size, "count": {"type": "integer", "minimum": 1}}}
    spec = {
        "type": "object",
        "properties": {"headGroupSpec": inside, "rayVersion": free},
        "required": ["headGroupSpec"],
    }
    schema = {"type": "object", "properties": {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
                                               "metadata": {"type": "object"}, "spec": spec}}  # fmt: skip
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    crd = {"kind": "CustomResourceDefinition", "apiVersion": "apiextensions.k8s.io/v1",
           "spec": {"group": "ray.io", "names": {"kind": "RayCluster"}, "versions": versions}}  # fmt: skip
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds/c.yaml").write_text(yaml.safe_dump(crd))

    def wrong(spec: dict) -> list[str]:
        from cluster.lint.crds import errors

        document = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"x": 1}, "spec": spec}
        return [where for where, _ in errors(document, str(tmp_path / "crds"))]

    assert (
        wrong({"headGroupSpec": {"size": 1}}) == wrong({"headGroupSpec": {"size": "1Gi"}, "rayVersion": {"b": 1}}) == []
    )
    assert wrong({"headGroupSpec": {"count": 0}}) == ["spec.headGroupSpec.count"]
    assert wrong({"headGroupSpec": {"cuont": 1}}) == ["spec.headGroupSpec"]
    assert wrong({}) == ["spec"]
    assert wrong({"headGroupSpec": {}, "rayVersion": {"a": 1}}) == ["spec.rayVersion.a"]
    with pytest.raises(ValueError, match="no CRD for RayJob"):
        lint(written(tmp_path, RAYJOB), str(tmp_path / "crds"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"), (b"a: [", "no YAML"), (b"- a\n- b\n", "neither"), (b"\x00\xff\xfe", "no "),
        (b"hello", "neither"),
        (b"a: &a [1]\n" + b"b: [" + b"*a, " * 300 + b"]\n", "aliases"), (b"x" * (3 << 20), "too large"),
        (b"kind: RayJob\n", "neither"), (b"[" * 5000, "n"),
    ],
)  # fmt: skip
def test_what_is_no_cluster_file_is_refused_in_a_line(tmp_path, content, said):
    (tmp_path / "f.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        lint([str(tmp_path / "f.yaml")])
    with pytest.raises(IsADirectoryError):
        lint([str(tmp_path)])
    with pytest.raises(FileNotFoundError):
        lint([str(tmp_path / "none")])


@pytest.mark.parametrize("value", [None, 3, "x", [], [1], {}, {"a": None}])
def test_any_value_anywhere_is_a_finding_and_never_a_traceback(tmp_path, value):
    for name, keys in (
        ("aws", AWS),
        ("gcp", GCP),
        ("cluster", CLUSTER),
        ("job", RAYJOB["spec"]),
        ("cron", CRON["spec"]),
    ):
        for key in keys:
            place = key if name in ("aws", "gcp") else f"spec.{key}"
            if place not in ("cluster_name", "provider"):
                lint(written(tmp_path, changed(GOOD[name], place, value)))


def test_the_verb_names_the_trap_and_ends_with_1(tmp_path):
    file = written(tmp_path, changed(AWS, "setup_commands", GONE))

    def millstream(*words: str):
        return subprocess.run([sys.executable, "-m", "jobs", "cluster", "lint", *words], cwd=ROOT, capture_output=True,
                              text=True, timeout=60)  # fmt: skip

    done = millstream(*file, "--json")
    assert done.returncode == 1
    assert [found["trap"] for found in json.loads(done.stdout)["findings"]] == ["nightly-wheel"]
    assert "[nightly-wheel]" in done.stderr
    assert millstream(*map(str, OURS)).returncode == 0
    missing = millstream(str(tmp_path / "none.yaml"))
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
