"""Cluster files without a trap, and what to break in them: each edit makes one trap, and no other."""

import copy

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
    "spec": {
        "entrypoint": "true", "backoffLimit": 2, "shutdownAfterJobFinishes": True,
        "rayClusterSpec": copy.deepcopy(CLUSTER),
    },
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
CHOSEN = {
    "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "j"},
    "spec": {"entrypoint": "true", "clusterSelector": {"ray.io/cluster": "c"}},
}  # fmt: skip
SERVICE = RAYCLUSTER | {"kind": "RayService", "spec": {"rayClusterConfig": copy.deepcopy(CLUSTER)}}
GOOD = {"aws": AWS, "gcp": GCP, "cluster": RAYCLUSTER, "job": RAYJOB, "raycron": RAYCRON, "cron": CRON}
GOOD |= {"chosen": CHOSEN, "service": SERVICE}
GONE = object()
HEAD = "spec.headGroupSpec.template.spec"
GROUP = "spec.workerGroupSpecs.0"
# (good document, dotted path, new value, the one trap it makes; None: it is as good as before)
TRAPS = [
    ("aws", "setup_commands", GONE, "nightly-wheel"),
    ("aws", "head_start_ray_commands", GONE, "open-dashboard"),
    ("aws", "head_start_ray_commands", ["ray start --head --dashboard-host 0.0.0.0"], "open-dashboard"),
    ("aws", "available_node_types.head.node_config.SecurityGroupIds", GONE, "open-ssh"),
    ("aws", "provider.security_group.IpPermissions", [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}], "open-ssh"),
    ("aws", "provider.security_group.IpPermissions", [{"IpRanges": [{"CidrIp": "0.0.0.0/1"}]}], "open-ssh"),
    ("aws", "provider.security_group.IpPermissions", [{"IpRanges": [{"CidrIp": "203.0.113.0/24"}]}], None),
    ("aws", "provider.security_group.IpPermissions", [{"IpRanges": [{"CidrIp": "mine"}]}], None),
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
    ("aws", "available_node_types.demand.max_workers", 0, "no-fallback"),
    ("aws", "available_node_types.demand.node_config.InstanceType", "m7i.xlarge", "no-fallback"),
    ("aws", "available_node_types.spot.idle_timeout_s", 7200, "idle-timeout"),
    ("aws", "setup_commands", ["pip install https://s3/ray-wheels/latest/ray-3.0.0.dev0.whl"], "nightly-wheel"),
    ("aws", "head_start_ray_commands.1", "ray start --head --dashboard-host='::'", "open-dashboard"),
    ("aws", "initialization_commands", ["export WANDB_API_KEY=abc"], "secret"),
    ("aws", "docker.run_options.2", "--env DB_PASSWORD=abc", "secret"),
    ("aws", "auth.ssh_private_key", "-----BEGIN RSA PRIVATE KEY-----\nMII", "secret"),
    ("aws", "available_node_types.head.node_config.BlockDeviceMappings",
     [{"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}], "plain-disk"),
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
    ("aws", "provider", GONE, "schema"),
    ("aws", "available_node_types.spot.docker", {"worker_image": "m:latest"}, "floating-image"),
    ("gcp", "available_node_types.demand.node_config.serviceAccounts.0.email", "1-compute@developer.google.com",
     "full-access-role"),
    ("aws", "available_node_types.demand.node_confg", {}, "schema"),
    ("gcp", "available_node_types.demand.node_config.scheduling", {}, "gpu-migration"),
    ("gcp", "available_node_types.demand.resources", {}, "no-resources"),
    ("gcp", "available_node_types.head.node_config.serviceAccounts", GONE, "full-access-role"),
    ("gcp", "available_node_types.spot.node_config.serviceAccounts.0.email", "1-compute@developer.gserviceaccount.com",
     "full-access-role"),
    ("gcp", "provider.type", "nowhere", "schema"),
    ("gcp", "provider.cache_stopped_nodes", True, "paid-disks"),
    ("gcp", "worker_start_ray_commands", ["ray start"], "no-preemption-watcher"),
    ("cluster", "spec.authOptions", GONE, "no-token"),
    ("cluster", "spec.headGroupSpec.serviceType", "LoadBalancer", "open-dashboard"),
    ("cluster", "spec.headGroupSpec.headService", {"spec": {"type": "NodePort"}}, "open-dashboard"),
    ("cluster", "spec.headGroupSpec.enableIngress", True, "open-dashboard"),
    ("cluster", "spec.headGroupSpec.servicetype", "ClusterIP", "schema"),
    ("cluster", "spec.headGroupSpec.rayStartParams", {}, "work-on-head"),
    ("cluster", "spec.headGroupSpec.rayStartParams", {"num-cpus": 0}, "schema"),
    ("cluster", f"{HEAD}.restartPolicy", "Always", "restart-policy"),
    ("cluster", f"{HEAD}.containers", [], "schema"),
    ("cluster", f"{GROUP}.template.spec.restartPolicy", "OnFailure", "restart-policy"),
    ("cluster", "spec.authOptions.mod", "token", "schema"),
    ("cluster", "spec.authOptions.mode", "disabled", "no-token"),
    ("cluster", "spec.rayVersion", GONE, "schema"),
    ("cluster", "spec.autoscalerOptions", {"idleTimeoutSeconds": 7200}, "idle-timeout"),
    ("cluster", "spec.autoscalerOptions", {"idleTimeout": 60}, "schema"),
    ("cluster", "spec.autoscalerOptions", {"image": "rayproject/ray:nightly"}, "floating-image"),
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
    ("cluster", f"{GROUP}.template.spec.terminationGracePeriodSeconds", 80, "missing-grace"),
    ("cluster", f"{GROUP}.template.spec.containers.0.lifecycle", GONE, "no-drain"),
    ("cluster", f"{GROUP}.template.spec.containers.0.env",
     [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "60"}], "missing-grace"),
    ("cluster", f"{HEAD}.containers.0.env.0.value", "3", "missing-grace"),
    ("cluster", f"{HEAD}.containers.0.env.0.value", "²", "missing-grace"),
    ("cluster", f"{GROUP}.maxReplicas", GONE, "schema"),
    ("cluster", f"{GROUP}.resources", {"GPU": "1"}, None),
    ("cluster", f"{GROUP}.idleTimeoutSeconds", 7200, "idle-timeout"),
    ("cluster", f"{GROUP}.minReplicas", 2, "never-zero"),
    ("cluster", f"{GROUP}.minReplicaz", 0, "schema"),
    ("cluster", "metadata.name", "x" * 54, "long-name"),
    ("cluster", "metadata.name", "Big_Name", "schema"),
    ("cluster", "apiVersion", "ray.io/v1alpha1", "schema"),
    ("cluster", "kind", "RayClutser", "schema"),
    ("cluster", "spec.historyServerOptions", {}, None),
    ("cluster", f"{GROUP}.maxReplicas", -1, "schema"),
    ("cluster", f"{GROUP}.rayStartParams", {"labels": "a=b"}, "schema"),
    ("cluster", "spec.headGroupSpec.resources", {"CPU": "0"}, "schema"),
    ("service", "spec.rayClusterConfig.authOptions", GONE, "no-token"),
    ("service", "metadata.name", "x" * 48, "long-name"),
    ("chosen", "spec.clusterSelector", {"a": "b"}, "schema"),
    ("chosen", "spec.ttlSecondsAfterFinished", 60, "schema"),
    ("chosen", "spec.backoffLimit", 2, "schema"),
    ("chosen", "spec.submissionMode", "SidecarMode", "schema"),
    ("job", "spec.submissionMode", "InteractiveMode", "schema"),
    ("job", "metadata.name", "x" * 48, "long-name"),
    ("job", "spec.clusterSelector", {"ray.io/cluster": "c"}, "schema"),
    ("job", "spec.rayClusterSpec", GONE, "schema"),
    ("job", "spec.historyServerOptions", {}, "schema"),
    ("job", "spec.ttlSecondsAfterFinished", -1, "schema"),
    ("job", "spec.activeDeadlineSeconds", 0, "schema"),
    ("job", "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "schema"),
    ("job", "spec.rayClusterSpec.enableInTreeAutoscaling", False, "never-zero"),
    ("job", "spec.rayClusterSpec.rayVersio", "2.60.0", "schema"),
    ("job", "spec.submissionMode", "SidecarMode", None),
    ("job", "spec.submitterPodTemplate", {"spec": {"containers": [{"name": "s", "image": "m"}]}}, "floating-image"),
    ("job", "spec.submitterPodTemplate", {"spec": {"containers": [{"name": "s", "imag": "m"}]}}, "schema"),
    ("job", "spec.entrypoint", "run --key AKIAIOSFODNN7EXAMPLE", "secret"),
    ("job", "spec.shutdownAfterJobFinishes", GONE, "never-zero"),
    ("job", "spec.deletionStrategy", {"deletionRules": [{}]}, "schema"),
    ("job", "spec.deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "schema"),
    ("job", "spec.runtimeEnvYAML", "env_vars: {HF_TOKEN: abc}", "secret"),
    ("job", "spec.runtimeEnvYAML", "a: [", "schema"),
    ("job", "spec.runtimeEnvYAML", "- a", "schema"),
    ("job", "spec.runtimeEnvYAML", "a: &a [*a]", "schema"),
    ("job", "spec.runtimeEnvYAML", "env_vars: {HF_TOKEN_PATH: /run/hf, HF_TOKEN: $HF}", None),
    ("raycron", "spec.concurrencyPolicy", "Forbid", "schema"),
    ("raycron", "spec.schedule", "TZ=UTC 0 2 * * *", "no-time-zone"),
    ("raycron", "spec.schedule", "0 2 * *", "schema"),
    ("raycron", "spec.schedule", GONE, "schema"),
    ("raycron", "spec.jobTemplate.rayClusterSpec.authOptions", GONE, "no-token"),
    ("raycron", "spec.jobTemplate.shutdownAfterJobFinishe", True, "schema"),
    ("raycron", "metadata.name", "x" * 37, "long-name"),
    ("cron", "spec.concurrencyPolicy", GONE, "overlap"),
    ("cron", "spec.startingDeadlineSeconds", GONE, "missed-ticks"),
    ("cron", "spec.timeZone", GONE, "no-time-zone"),
    ("cron", "spec.jobTemplate.spec.template.spec.containers.0.image", "m:latest", "floating-image"),
    ("cron", "spec.jobTemplate.spec.template.spec.containers.0.image", "nvidia/cuda:12.8.0-devel-ubuntu22.04", None),
    ("cron", "spec.jobTemplate.spec.template.spec.containers.0.args", ["AKIAIOSFODNN7EXAMPLE"], "secret"),
    ("cron", "spec.jobTemplat", {}, "schema"),
]  # fmt: skip


def changed(document: dict, path: str, value) -> dict:
    out = copy.deepcopy(document)
    *way, last = path.split(".")
    node = out
    for step in way:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    if isinstance(node, list):
        node[int(last) : int(last) + 1] = [] if value is GONE else [value]
    elif value is GONE:
        del node[last]
    else:
        node[last] = value
    return out
