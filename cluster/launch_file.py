"""Reads a file of `ray up` (AWS, Google) as Ray itself would: what is left out is what Ray fills in.

Traps, all of Ray 2.60: left-out start commands bind the dashboard to 0.0.0.0; a security group that Ray makes lets the
whole internet in by ssh, also beside rules of one's own (ray/autoscaler/_private/aws/config.py, _update_inbound_rules).
"""

import contextlib
import io
import logging
import re

from cluster.facts import EVERYBODY, Facts, Node, Way, at, dicts


def read(config: dict) -> Facts:
    """ValueError if Ray would not take it, or if its provider is neither aws nor gcp."""
    cloud = at(config, "provider", "type")
    if cloud not in ("aws", "gcp"):
        raise ValueError(f"provider {cloud!r}: aws and gcp are known here, and KubeRay's manifests")
    config = _as_ray_reads_it(config)
    nodes = [node for name in config["available_node_types"] for node in _nodes(config, name, cloud)]
    ways, unknown = (_aws_ways if cloud == "aws" else _gcp_ways)(config)
    region = config["provider"].get("region") or ""
    return Facts(
        f"ray up, {cloud}", config["cluster_name"], cloud, region, nodes, config["max_workers"], _has_token(config),
        [*ways, _dashboard(config)], unknown,
    )  # fmt: skip


def _as_ray_reads_it(config: dict) -> dict:
    """With Ray's defaults, and checked against its schema."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)  # it tells what it fills in
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray warns there, where --json prints its object
            with contextlib.suppress(RuntimeError):  # raw files lack cluster_synced_files, which Ray itself fills in
                validate_config(config)
            prepared = prepare_config(config)
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise ValueError(f"Ray refuses {where}: {error.message[:200]}") from None
    except (AssertionError, AttributeError, KeyError, TypeError) as error:  # what its code makes of a wrong shape
        raise ValueError(f"Ray cannot read it: {type(error).__name__}: {str(error)[:200]}") from None
    return prepared


def _nodes(config: dict, name: str, cloud: str) -> list[Node]:
    """The head's type may also be a worker's: then it is two."""
    given = config["available_node_types"][name]
    node, resources = given["node_config"], given["resources"]
    machine = node.get("InstanceType" if cloud == "aws" else "machineType")
    idle = given.get("idle_timeout_s")
    what = {
        "machine": str(machine).rpartition("/")[2] if machine else None,
        "market": "spot" if is_spot(node) else "on-demand",
        "cpus": resources.get("CPU"),
        "gpus": resources.get("GPU"),
        "priority": given.get("priority", 0),
        "extra": ", ".join(str(one.get("acceleratorType")) for one in dicts(node.get("guestAccelerators"))),
    }
    found = [Node(name, least=1, most=1, head=True, **what)] if name == config["head_node_type"] else []
    if given["max_workers"] > 0:
        idle = 60 * config["idle_timeout_minutes"] if idle is None else idle
        found.append(Node(name, least=given["min_workers"], most=given["max_workers"], idle_s=idle, **what))
    return found or [Node(name, least=0, most=0, **what)]


def is_spot(node: dict) -> bool:
    """Whether a node_config of AWS or Google asks for what may be taken away."""
    scheduling = node.get("scheduling")
    scheduling = scheduling if isinstance(scheduling, list) else [scheduling]  # Ray's samples have a list
    return (
        at(node, "InstanceMarketOptions", "MarketType") == "spot"
        or any(one.get("provisioningModel") == "SPOT" or one.get("preemptible") is True for one in dicts(scheduling))
    )  # fmt: skip


def _has_token(config: dict) -> bool:
    """`ray start` asks for a token where the mode says so, or where it finds one."""
    said = [config.get(key) for key in config if key.endswith("commands") or key == "docker"]
    return "RAY_AUTH_MODE=token" in str(said) or any("auth_token" in str(path) for path in config["file_mounts"])


def _dashboard(config: dict) -> Way:
    commands = " ".join(map(str, config["head_start_ray_commands"]))
    host = re.search(r"--dashboard-host[= ]\s*(\S+)", commands)
    if not host or host[1] in ("127.0.0.1", "localhost", "::1"):
        return Way("who may ssh to the head", "dashboard and jobs, 8265: it listens on the head's loopback only")
    return Way("whoever the firewall lets to the head", f"dashboard and jobs, 8265: it listens on {host[1]}")


def _aws_ways(config: dict) -> tuple[list[Way], list[str]]:
    groups, made = set(), False
    for given in config["available_node_types"].values():
        node = given["node_config"]
        cards = [at(card, "Groups") for card in dicts(node.get("NetworkInterfaces"))]
        own = [one for many in [node.get("SecurityGroupIds"), *cards] if isinstance(many, list) for one in many]
        groups |= set(map(str, own))
        made |= not own
    ways = [Way(f"who security group {group} lets in", "the nodes") for group in sorted(groups)]
    unknown = [f"the rules of security group {group}: they are not in this file" for group in sorted(groups)]
    if not made:
        return ways, unknown
    group = config["provider"].get("security_group", {})
    name = group.get("GroupName", f"ray-autoscaler-{config['cluster_name']}")
    unknown.append(f"whether a security group {name} exists already: Ray would leave its rules as they are")
    whole = Way(EVERYBODY[0], "ssh, 22, of every node: Ray adds this rule to each security group that it makes", True)
    return [*ways, whole, *(way for rule in dicts(group.get("IpPermissions")) for way in _rule(rule))], unknown


def _rule(rule: dict) -> list[Way]:
    low, high = rule.get("FromPort"), rule.get("ToPort")
    ports = "all ports" if rule.get("IpProtocol") in ("-1", -1) else f"{rule.get('IpProtocol')} {low}"
    what = f"{ports}{f'-{high}' if high != low else ''} of every node"
    ranges = [*dicts(rule.get("IpRanges")), *dicts(rule.get("Ipv6Ranges"))]
    who = [str(one.get("CidrIp") or one.get("CidrIpv6")) for one in ranges]
    who += [f"security group {one.get('GroupId')}" for one in dicts(rule.get("UserIdGroupPairs"))]
    who += [f"prefix list {one.get('PrefixListId')}" for one in dicts(rule.get("PrefixListIds"))]
    return [Way(one, what, one in EVERYBODY) for one in who]


def _gcp_ways(config: dict) -> tuple[list[Way], list[str]]:
    networks, chosen = set(), False
    for given in config["available_node_types"].values():
        cards = dicts(given["node_config"].get("networkInterfaces"))
        networks |= {str(card.get("subnetwork") or card.get("network")).rpartition("/")[2] for card in cards}
        chosen |= not cards
    ways = [Way(f"who the firewall of {network} lets in", "the nodes") for network in sorted(networks)]
    unknown = [f"the firewall rules of {network}: they are not in this file" for network in sorted(networks)]
    if chosen:
        ways.append(
            Way("who the project's first network lets in: the default one, everybody by ssh", "the nodes", True)
        )
        unknown.append("the network: without networkInterfaces Ray takes the first one of the region")
    return ways, unknown
