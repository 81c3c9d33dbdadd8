"""Files of `ray up`: Ray's own schema, and the traps of its defaults (docs.ray.io, cluster/vms)."""

import contextlib
import copy
import io
import logging
import re

from cluster.lint.finding import Finding, image_trouble, items, mapping, secrets

_GRACE = re.compile(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)")


def findings(path: str, config: dict) -> list[Finding]:
    found: list[Finding] = []

    def trap(name: str, where: str, message: str, severity: str = "error") -> None:
        found.append(Finding(path, where, name, message, severity))

    if error := _against_the_schema(config):
        trap("schema", "the whole file", error)
    for where, message in secrets(config):
        trap("secret", where, message)
    provider, types = mapping(config.get("provider")), mapping(config.get("available_node_types"))
    head = str(config.get("head_node_type", ""))
    _commands(config, trap)
    _money(config, provider, types, head, trap)
    for where, image in _images(config):
        if trouble := image_trouble(image):
            trap(trouble[0], where, trouble[1])
    if provider.get("type") == "aws":
        _aws(config, provider, types, trap)
    if provider.get("type") == "gcp":
        _gcp(types, head, trap)
    for name, node in types.items():
        if name == head and _spot(mapping(mapping(node).get("node_config"))):
            trap(
                "spot-head", f"available_node_types.{name}", "the head is a spot instance: when it goes, every job goes"
            )
    return found


def _against_the_schema(config: dict) -> str:
    """What Ray's own validation says. It asks no cloud; what it prints is not for here."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # whatever Ray trips over is an error of the file
        text = " ".join(str(getattr(error, "message", "") or error).split())[:300]
        at = ".".join(map(str, getattr(error, "absolute_path", ())))
        return f"{at + ': ' if at else ''}{text or type(error).__name__}"
    return ""


def _images(config: dict):
    docker = mapping(config.get("docker"))
    for key in ("image", "head_image", "worker_image"):
        if isinstance(docker.get(key), str):
            yield f"docker.{key}", docker[key]
    for name, node in mapping(config.get("available_node_types")).items():
        inside = mapping(mapping(node).get("docker"))
        for key in ("image", "worker_image"):
            if isinstance(inside.get(key), str):
                yield f"available_node_types.{name}.docker.{key}", inside[key]


def _commands(config: dict, trap) -> None:
    if "setup_commands" not in config:
        trap("nightly-wheel", "setup_commands", "unset, Ray installs a nightly wheel on every node: set it to []")
    docker = mapping(config.get("docker"))
    options = " ".join(str(option) for key in ("run_options", "head_run_options") for option in items(docker.get(key)))
    starts = {
        name: [str(line) for line in items(config.get(f"{name}_start_ray_commands"))] for name in ("head", "worker")
    }
    setup = " ".join(str(line) for key in ("setup_commands", "head_setup_commands", "initialization_commands")
                     for line in items(config.get(key)))  # fmt: skip
    begun = " ".join([options, setup, *starts["head"]])
    host = re.search(r"--dashboard-host[= ](\S+)", " ".join(starts["head"]))
    if not starts["head"]:
        trap("open-dashboard", "head_start_ray_commands", "unset, the dashboard listens to everybody: start Ray with "
             "--dashboard-host=127.0.0.1")  # fmt: skip
    elif host and host[1] not in ("127.0.0.1", "localhost", "::1"):
        trap("open-dashboard", "head_start_ray_commands", f"the dashboard listens on {host[1]}, and whoever reaches it "
             "runs code: --dashboard-host=127.0.0.1, and an ssh tunnel")  # fmt: skip
    grace = _GRACE.search(begun)
    if not grace or int(grace[1]) < 30:
        trap("missing-grace", "docker.run_options", f"a job that is stopped gets {grace[1] if grace else 3} s before "
             "SIGKILL: set RAY_JOB_STOP_WAIT_TIME_S=120 on the head, so that it can save")  # fmt: skip
    spot = any(
        _spot(mapping(mapping(node).get("node_config")))
        for node in mapping(config.get("available_node_types")).values()
    )
    if spot and not re.search(r"cluster\.preemption|millstream cluster watch", " ".join(starts["worker"])):
        trap("no-preemption-watcher", "worker_start_ray_commands", "nobody tells Ray that a spot instance is about to "
             "go: start `nohup python -m cluster.preemption &` with it")  # fmt: skip
    mounted = any("auth_token" in str(name) for name in mapping(config.get("file_mounts")))
    if not (mounted and "RAY_AUTH_MODE=token" in begun):
        trap("no-token", "file_mounts", "without a token, whoever reaches the head runs code on it: mount "
             "~/.ray/auth_token and set RAY_AUTH_MODE=token")  # fmt: skip


def _money(config: dict, provider: dict, types: dict, head: str, trap) -> None:
    if provider.get("cache_stopped_nodes", provider.get("type") != "gcp"):  # Ray's default, by cloud
        trap("paid-disks", "provider.cache_stopped_nodes", "nodes stop and do not end, and their disks are paid for: "
             "set it to false")  # fmt: skip
    idle = config.get("idle_timeout_minutes", 5)
    if isinstance(idle, int | float) and idle > 60:
        trap("idle-timeout", "idle_timeout_minutes", f"a node without work is paid for another {idle} minutes")
    workers = {name: mapping(node) for name, node in types.items() if name != head}
    for name, node in workers.items():
        if isinstance(node.get("min_workers"), int) and node["min_workers"] > 0:
            trap("never-zero", f"available_node_types.{name}.min_workers", f"{node['min_workers']} nodes stay up "
                 "without work", "warning")  # fmt: skip
    spot = {name: node for name, node in workers.items() if _spot(mapping(node.get("node_config")))}
    behind = [_number(node.get("priority")) for name, node in workers.items() if name not in spot]
    for name, node in spot.items():
        if not any(other < _number(node.get("priority")) for other in behind):
            trap("no-fallback", f"available_node_types.{name}", "no on-demand type of lower priority: where there is "
                 "no spot capacity, the run waits")  # fmt: skip
    if head in types and mapping(mapping(types[head]).get("resources")).get("CPU") != 0:
        trap("work-on-head", f"available_node_types.{head}.resources", "set CPU: 0, or work is placed on the head and "
             "starves it", "warning")  # fmt: skip


def _number(value) -> float:
    return value if isinstance(value, int | float) else 0


def _spot(node: dict) -> bool:
    scheduling = node.get("scheduling")
    rows = scheduling if isinstance(scheduling, list) else [scheduling]
    google = any(mapping(row).get("preemptible") or mapping(row).get("provisioningModel") == "SPOT" for row in rows)
    return google or mapping(node.get("InstanceMarketOptions")).get("MarketType") == "spot"


def _aws(config: dict, provider: dict, types: dict, trap) -> None:
    rules = mapping(provider.get("security_group")).get("IpPermissions")
    if bare := [
        name for name, node in types.items() if not mapping(mapping(node).get("node_config")).get("SecurityGroupIds")
    ]:
        trap("open-ssh", f"available_node_types.{bare[0]}", "Ray makes a group with port 22 open to 0.0.0.0/0, "
             "whatever IpPermissions says: make one (aws-account.yaml), and give its SecurityGroupIds")  # fmt: skip
    for at, rule in enumerate(items(rules)):
        ranges = [mapping(r).get(k) for kind, k in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6"))
                  for r in items(mapping(rule).get(kind))]  # fmt: skip
        if wide := [cidr for cidr in ranges if cidr in ("0.0.0.0/0", "::/0")]:
            ports = mapping(rule).get("FromPort", "all")
            trap("open-ssh", f"provider.security_group.IpPermissions.{at}", f"port {ports} is open to {wide[0]}: name "
                 "your range")  # fmt: skip
    for name, node in types.items():
        where, made = f"available_node_types.{name}.node_config", mapping(mapping(node).get("node_config"))
        profile = str(mapping(made.get("IamInstanceProfile")))
        if "IamInstanceProfile" not in made:
            trap("full-access-role", where, "without IamInstanceProfile, Ray's own role has AmazonEC2FullAccess and "
                 "AmazonS3FullAccess: give one (aws-account.yaml makes them)")  # fmt: skip
        elif re.search(r"(?i)fullaccess|admin|poweruser", profile):
            trap("full-access-role", where, f"{profile}: a role for everything; give the node what it needs")
        metadata = mapping(made.get("MetadataOptions"))
        if metadata.get("HttpTokens") != "required":
            trap(
                "imds-v1",
                where,
                "MetadataOptions: {HttpTokens: required}, or any request forged on the node reads its role",
            )
        elif config.get("docker") and _number(metadata.get("HttpPutResponseHopLimit")) < 2:
            trap("imds-hops", where, "HttpPutResponseHopLimit below 2: a container cannot reach the role or the notice")
        disks = [mapping(mapping(disk).get("Ebs")) for disk in items(made.get("BlockDeviceMappings"))]
        if not disks or any(disk.get("Encrypted") is not True for disk in disks if disk):
            trap("plain-disk", where, "BlockDeviceMappings: give every disk Encrypted: true")


def _gcp(types: dict, head: str, trap) -> None:
    for name, node in types.items():
        where, made = f"available_node_types.{name}", mapping(mapping(node).get("node_config"))
        gpu = made.get("guestAccelerators") or re.match(r"(g2|a2|a3|a4)-", str(made.get("machineType", "")))
        scheduling = made.get("scheduling")
        rows = scheduling if isinstance(scheduling, list) else [scheduling]
        if gpu and not any(mapping(row).get("onHostMaintenance") == "TERMINATE" for row in rows):
            trap(
                "gpu-migration", where, "a VM with GPUs cannot be migrated: scheduling: {onHostMaintenance: TERMINATE}"
            )
        if name != head and not mapping(mapping(node).get("resources")):
            trap("no-resources", where, "on Google Cloud Ray does not look up CPUs and GPUs: give resources")
        accounts = items(made.get("serviceAccounts"))
        if not accounts or any("-compute@developer" in str(mapping(one).get("email")) for one in accounts):
            trap(
                "full-access-role",
                where,
                "the project's default account is its editor: give a serviceAccount of its own",
            )
