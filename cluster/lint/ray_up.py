"""Files of `ray up`: Ray's own schema, and the traps of its defaults (docs.ray.io, cluster/vms)."""

import contextlib
import copy
import io
import ipaddress
import logging
import re

from cluster.launch_file import is_spot
from cluster.lint.finding import Finding, image_trouble, items, mapping, named_like_a_secret, number, secrets, tree

_GRACE = re.compile(r"RAY_JOB_STOP_WAIT_TIME_S=(\d{1,9})\b")
_GIVEN = re.compile(r"(?:--env[= ]|-e |\bexport )\s*[\"']?([A-Za-z_]\w*)=(\S+)")  # variables of containers and shells
_NIGHTLY = re.compile(r"ray-wheels|\bray-[\d.]+dev0|\bnightly\b")


def findings(path: str, config: dict) -> list[Finding]:
    found: list[Finding] = []

    def trap(name: str, where: str, message: str, severity: str = "error") -> None:
        found.append(Finding(path, where, name, message, severity))

    if error := _against_the_schema(config):
        trap("schema", *error)
    for where, message in secrets(config):
        trap("secret", where, message)
    for where, text in tree(config):
        for key, value in _GIVEN.findall(text) if isinstance(text, str) else ():
            if named_like_a_secret(key, value):
                trap("secret", where, f"{key} is given in plain: mount a file, or give the nodes a role")
    provider, types = mapping(config.get("provider")), mapping(config.get("available_node_types"))
    head = str(config.get("head_node_type", ""))
    _commands(config, trap)
    _money(config, provider, types, head, trap)
    for where, image in _images(config):
        if trouble := image_trouble(image):
            trap(trouble[0], where, trouble[1])
    if provider.get("type") == "aws":
        _aws(config, provider, types, head, trap)
    if provider.get("type") == "gcp":
        _gcp(types, head, trap)
    for name, node in types.items():
        if name == head and is_spot(_made(node)):
            trap(
                "spot-head", f"available_node_types.{name}", "the head is a spot instance: when it goes, every job goes"
            )
    return found


def _against_the_schema(config: dict) -> tuple[str, str] | None:
    """(where, what) Ray's own validation says. It asks no cloud; what it prints is not for here."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # whatever Ray trips over is an error of the file
        text = " ".join(str(getattr(error, "message", "") or error).split())[:300]
        where = ".".join(map(str, getattr(error, "absolute_path", ()))) or "the whole file"
        if isinstance(error, KeyError):
            text = f"{text} is missing"
        return where, text or type(error).__name__
    return None


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
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"):
        if wheel := next((line for line in items(config.get(key)) if _NIGHTLY.search(str(line))), None):
            trap("nightly-wheel", key, f"{str(wheel)[:100]!r} is another Ray tomorrow: pin it, or put it in the image")
    docker = mapping(config.get("docker"))
    options = " ".join(str(option) for key in ("run_options", "head_run_options") for option in items(docker.get(key)))
    starts = {
        name: [str(line) for line in items(config.get(f"{name}_start_ray_commands"))] for name in ("head", "worker")
    }
    setup = " ".join(str(line) for key in ("setup_commands", "head_setup_commands", "initialization_commands")
                     for line in items(config.get(key)))  # fmt: skip
    begun = " ".join([options, setup, *starts["head"]])
    hosts = re.findall(r"--dashboard-host[= ]+[\"']?([^\s\"';]+)", " ".join(starts["head"]))
    if not starts["head"]:
        trap("open-dashboard", "head_start_ray_commands", "unset, the dashboard listens to everybody: start Ray with "
             "--dashboard-host=127.0.0.1")  # fmt: skip
    for host in hosts:
        if host not in ("127.0.0.1", "localhost", "::1"):
            trap("open-dashboard", "head_start_ray_commands", f"the dashboard listens on {host}, and whoever reaches "
                 "it runs code: --dashboard-host=127.0.0.1, and an ssh tunnel")  # fmt: skip
    grace = _GRACE.search(begun)
    if not grace or int(grace[1]) < 30:
        trap("missing-grace", "docker.run_options", f"a job that is stopped gets {grace[1] if grace else 3} s before "
             "SIGKILL: set RAY_JOB_STOP_WAIT_TIME_S=120 on the head, so that it can save")  # fmt: skip
    spot = any(is_spot(_made(node)) for node in mapping(config.get("available_node_types")).values())
    if spot and not re.search(r"cluster\.preemption|millstream cluster watch", " ".join(starts["worker"])):
        trap("no-preemption-watcher", "worker_start_ray_commands", "nobody tells Ray that a spot instance is about to "
             "go: start `setsid -f python -m cluster.preemption` after Ray")  # fmt: skip
    mounted = any("auth_token" in str(name) for name in mapping(config.get("file_mounts")))
    if not (mounted and "RAY_AUTH_MODE=token" in begun):
        trap("no-token", "file_mounts", "without a token, whoever reaches the head runs code on it: mount "
             "~/.ray/auth_token and set RAY_AUTH_MODE=token")  # fmt: skip


def _money(config: dict, provider: dict, types: dict, head: str, trap) -> None:
    if provider.get("cache_stopped_nodes", provider.get("type") in ("aws", "azure")):  # Ray's default, by cloud
        trap("paid-disks", "provider.cache_stopped_nodes", "nodes stop and do not end, and their disks are paid for: "
             "set it to false")  # fmt: skip
    idle = config.get("idle_timeout_minutes", 5)
    if number(idle) > 60:
        trap("idle-timeout", "idle_timeout_minutes", f"a node without work is paid for another {idle} minutes")
    workers = {name: mapping(node) for name, node in types.items() if name != head}
    for name, node in workers.items():
        if number(node.get("idle_timeout_s")) > 3600:
            why = f"a node without work is paid for another {node['idle_timeout_s']} s"
            trap("idle-timeout", f"available_node_types.{name}.idle_timeout_s", why)
        if number(node.get("min_workers")) > 0:
            trap("never-zero", f"available_node_types.{name}.min_workers", f"{node['min_workers']} nodes stay up "
                 "without work", "warning")  # fmt: skip
        if is_spot(_made(node)) and not any(_stands_in(other, node) for other in workers.values()):
            trap("no-fallback", f"available_node_types.{name}", "no on-demand type of lower priority: where there is "
                 "no spot capacity, the run waits")  # fmt: skip
    if head in types and mapping(mapping(types[head]).get("resources")).get("CPU") != 0:
        trap("work-on-head", f"available_node_types.{head}.resources", "set CPU: 0, or work is placed on the head and "
             "starves it", "warning")  # fmt: skip


def _made(node) -> dict:
    return mapping(mapping(node).get("node_config"))


def _gpus(node: dict) -> bool:
    """Whether machines of a type have GPUs, as far as their names say."""
    made = _made(node)
    machine = str(made.get("InstanceType") or made.get("machineType") or "")
    named = re.match(r"(p\d\w*|g\d\w*|gr6)\.|(g[24]|a[234]x?)-", machine)
    return bool(named or made.get("guestAccelerators") or number(mapping(node.get("resources")).get("GPU")))


def _stands_in(other: dict, spot: dict) -> bool:
    """Whether `other` takes the work when there is no capacity for `spot`."""
    may = not is_spot(_made(other)) and other.get("max_workers", 1) != 0 and _gpus(other) >= _gpus(spot)
    return may and number(other.get("priority")) < number(spot.get("priority"))


def _aws(config: dict, provider: dict, types: dict, head: str, trap) -> None:
    if bare := [name for name, node in types.items() if not _own_group(_made(node))]:
        trap("open-ssh", f"available_node_types.{bare[0]}", "Ray makes a group with port 22 open to 0.0.0.0/0, "
             "whatever IpPermissions says: make one (aws-account.yaml), and give its SecurityGroupIds")  # fmt: skip
    for at, rule in enumerate(items(mapping(provider.get("security_group")).get("IpPermissions"))):
        ranges = [mapping(r).get(k) for kind, k in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6"))
                  for r in items(mapping(rule).get(kind))]  # fmt: skip
        if wide := [cidr for cidr in ranges if _is_wide(cidr)]:
            ports = mapping(rule).get("FromPort", "all")
            trap("open-ssh", f"provider.security_group.IpPermissions.{at}", f"port {ports} is open to {wide[0]}: name "
                 "your range")  # fmt: skip
    for name, node in types.items():
        where, made = f"available_node_types.{name}.node_config", _made(node)
        profile = str(mapping(made.get("IamInstanceProfile")))
        if name == head and "IamInstanceProfile" not in made:  # workers have none, then
            trap("full-access-role", where, "without IamInstanceProfile, the head gets Ray's own role, with "
                 "AmazonEC2FullAccess and AmazonS3FullAccess: give one (aws-account.yaml makes it)")  # fmt: skip
        elif re.search(r"(?i)fullaccess|admin|poweruser", profile):
            trap("full-access-role", where, f"{profile}: a role for everything; give the node what it needs")
        metadata = mapping(made.get("MetadataOptions"))
        if metadata.get("HttpTokens") != "required":
            trap(
                "imds-v1",
                where,
                "MetadataOptions: {HttpTokens: required}, or any request forged on the node reads its role",
            )
        elif config.get("docker") and number(metadata.get("HttpPutResponseHopLimit")) < 2:
            trap("imds-hops", where, "HttpPutResponseHopLimit below 2: a container cannot reach the role or the notice")
        disks = [mapping(disk["Ebs"]) for disk in map(mapping, items(made.get("BlockDeviceMappings"))) if "Ebs" in disk]
        if not disks or any(disk.get("Encrypted") is not True for disk in disks):
            trap("plain-disk", where, "BlockDeviceMappings: give every disk Encrypted: true")


def _own_group(made: dict) -> bool:
    """Whether a node names its security groups, itself or for each of its network interfaces."""
    cards = items(made.get("NetworkInterfaces"))
    return bool(made.get("SecurityGroupIds") or (cards and all(mapping(card).get("Groups") for card in cards)))


def _is_wide(cidr) -> bool:
    """Whether a range is the internet, or a good part of it."""
    try:
        return ipaddress.ip_network(str(cidr), strict=False).prefixlen < 8
    except ValueError:
        return False


def _gcp(types: dict, head: str, trap) -> None:
    for name, node in types.items():
        where, made = f"available_node_types.{name}", _made(node)
        scheduling = made.get("scheduling")
        rows = scheduling if isinstance(scheduling, list) else [scheduling]
        if _gpus(mapping(node)) and not any(mapping(row).get("onHostMaintenance") == "TERMINATE" for row in rows):
            trap("gpu-migration", where, "a VM with GPUs cannot be migrated: scheduling: {onHostMaintenance: "
                 "TERMINATE}")  # fmt: skip
        if name != head and not mapping(mapping(node).get("resources")):
            trap("no-resources", where, "on Google Cloud Ray does not look up CPUs and GPUs: give resources")
        accounts = items(made.get("serviceAccounts"))
        if name == head and not accounts:  # workers have none, then
            trap("full-access-role", where, "without serviceAccounts, the head gets Ray's own account, with "
                 "compute.admin and every object of the project: give one (gcp-account.sh makes it)")  # fmt: skip
        if any("-compute@developer" in str(mapping(one).get("email")) or mapping(one).get("email") == "default"
               for one in accounts):  # fmt: skip
            trap("full-access-role", where, "the project's default account is its editor: give one of its own")
