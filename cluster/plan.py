"""What a cluster file would make: machines, the most they can cost an hour, what goes when idle, who can reach it.

Reads the file and a table of prices, asks no cloud. A machine that is not in the table has no price here, and sums with
it in them are unknown: the part that is known is said beside.
"""

import json
from dataclasses import asdict
from pathlib import Path

from cluster import launch_file, manifests, reading
from cluster.facts import Facts, Node

_PRICES = Path(__file__).with_name("prices.json")
_HOURS_A_MONTH = 730


def plan(path: str, prices: dict | None = None) -> dict:
    """{kind, name, region, max_workers, nodes, cost: {at_rest, most, ceiling}, token, reach, unknown, notes, prices}.

    nodes: [{name, head, machine, market, min, max, cpus, gpus, gpu, priority, idle_s, usd_hour}]; usd_hour: {on_demand,
    spot}, or None.
    cost: each {usd_hour, known_usd_hour, nodes: {name: count}}, usd_hour None if a price is unknown. at_rest: the head
    and min_workers; most: the dearest that max_workers allows, spot machines at their typical price; ceiling: the same
    with spot machines at the on-demand price, which is as far as a spot price can rise.
    prices: as prices.json, the default. ValueError if the file is none of a cluster.
    """
    prices = prices or json.loads(_PRICES.read_text())
    facts = _read(Path(path))
    nodes = [_priced(node, facts, prices) for node in facts.nodes]
    return {
        "file": path,
        "kind": facts.kind,
        "name": facts.name,
        "region": facts.region or None,
        "max_workers": facts.most,
        "nodes": nodes,
        "cost": {
            "at_rest": _cost([node | {"max": node["min"]} for node in nodes], facts.most, "spot"),
            "most": _cost(nodes, facts.most, "spot"),
            "ceiling": _cost(nodes, facts.most, "on_demand"),
        },
        "token": facts.token,
        "reach": [asdict(way) for way in facts.ways],
        "unknown": [
            *(_why_unknown(node, facts, prices) for node in nodes if node["max"] and not node["usd_hour"]),
            *facts.unknown,
        ],
        "notes": facts.notes + _price_notes(nodes, facts, prices),
        "prices": {key: prices.get(key) for key in ("date", "note", "sources")},
    }


def _read(path: Path) -> Facts:
    documents = reading.documents(str(path))
    try:
        if len(documents) == 1 and isinstance(documents[0].get("provider"), dict):
            return launch_file.read(documents[0])
        if any(one.get("kind") in manifests.KINDS for one in documents):
            others = [other for other in sorted(path.parent.glob("*.yaml")) if other.resolve() != path.resolve()]
            return manifests.read(documents, [one for other in others for one in _policies(other)])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    wanted = f"a file of `ray up` has a provider, KubeRay's manifests are {', '.join(manifests.KINDS)}"
    raise ValueError(f"{path}: no cluster file: {wanted}")


def _policies(path: Path) -> list[dict]:
    """NetworkPolicies of a file that lies beside; whatever else that file is, is not our concern."""
    try:
        return [one for one in reading.documents(str(path)) if one.get("kind") == "NetworkPolicy"]
    except (OSError, ValueError):
        return []


def _priced(node: Node, facts: Facts, prices: dict) -> dict:
    known = _machine(node, facts, prices)
    usd = {"on_demand": known["on_demand"], "spot": known["spot"]} if known and not node.extra else None
    cpus, gpus = known.get("cpus"), known.get("gpus")
    return {
        "name": node.name,
        "head": node.head,
        "machine": node.machine,
        "market": node.market,
        "min": node.least,
        "max": node.most,
        "cpus": cpus if node.cpus is None or (facts.cloud and cpus) else node.cpus,  # what it has, not what Ray is told
        "gpus": (gpus or (0 if known else None)) if node.gpus is None else node.gpus,
        "gpu": known.get("gpu") or node.extra or None,
        "priority": node.priority,
        "idle_s": node.idle_s,
        "usd_hour": usd if _region_known(node, facts, prices) else None,
    }


def _machine(node: Node, facts: Facts, prices: dict) -> dict:
    """Its entry in the table, {} if there is none. On Kubernetes the name alone tells the cloud."""
    clouds = [facts.cloud] if facts.cloud else ["aws", "gcp"]
    tables = [prices.get(cloud, {}).get("machines", {}) for cloud in clouds]
    return next((table[node.machine] for table in tables if node.machine in table), {})


def _region_known(node: Node, facts: Facts, prices: dict) -> bool:
    return not facts.cloud or facts.region in prices.get(facts.cloud, {}).get("regions", [])


def _why_unknown(node: dict, facts: Facts, prices: dict) -> str:
    what = f"the price of {node['name']}"
    if not node["machine"]:
        return f"{what}: the file names no machine for it"
    if facts.cloud and facts.region not in (regions := prices.get(facts.cloud, {}).get("regions", [])):
        return f"{what} ({node['machine']}) in {facts.region}: the table has {', '.join(regions)}"
    attached = f" with {node['gpu']}" if node["gpu"] else ""
    return f"{what}: {node['machine']}{attached} is not in the table of {prices.get('date')}"


def _price_notes(nodes: list[dict], facts: Facts, prices: dict) -> list[str]:
    notes = []
    if unsaid := [node["name"] for node in nodes if not node["market"] and node["usd_hour"]]:
        notes.append(f"{', '.join(unsaid)}: spot or on-demand is not said, priced as on-demand")
    if not facts.cloud and any(node["usd_hour"] for node in nodes):
        where = "; ".join(", ".join(prices[cloud]["regions"]) for cloud in ("aws", "gcp") if cloud in prices)
        notes.append(f"the file names no region: prices are those of {where}")
    return notes


def _cost(nodes: list[dict], most: int, spot: str) -> dict:
    """The head, the least of each type, and as many of the dearest as `most` leaves room for.

    spot: which price spot machines have, "spot" or "on_demand".
    """

    def price(node: dict) -> float | None:
        return node["usd_hour"] and node["usd_hour"][spot if node["market"] == "spot" else "on_demand"]

    heads, workers = [node for node in nodes if node["head"]], [node for node in nodes if not node["head"]]
    room = most - sum(node["min"] for node in workers)
    counts = {node["name"]: 0 for node in nodes}  # a type may be the head's and workers' too
    known, certain = 0.0, True
    for node in [*heads, *sorted(workers, key=lambda node: -(price(node) or 0))]:
        more = node["max"] - node["min"] if node["head"] else max(0, min(node["max"] - node["min"], room))
        count = node["min"] + more
        room -= 0 if node["head"] else more
        counts[node["name"]] += count
        known += count * (price(node) or 0)
        # One without a price may be the dearest of all, even where the others leave it no room.
        certain = certain and (price(node) is not None or not node["max"])
    return {"usd_hour": round(known, 4) if certain else None, "known_usd_hour": round(known, 4), "nodes": counts}


def lines(plan: dict) -> list[str]:
    """The plan for people."""
    where, cost = f" in {plan['region']}" if plan["region"] else "", plan["cost"]
    text = [f"{plan['name']}: {plan['kind']}{where}, at most {plan['max_workers']} workers at once"]
    text += [f"  {_node_line(node)}" for node in sorted(plan["nodes"], key=lambda n: (not n["head"], -n["priority"]))]
    if plan["nodes"]:
        rest = cost["at_rest"]["usd_hour"]
        text.append(f"at rest: {_money(cost['at_rest'])}{f', ${rest * _HOURS_A_MONTH:,.0f} a month' if rest else ''}")
        text.append(f"at most: {_money(cost['most'])}")
    if any(node["market"] == "spot" and node["max"] for node in plan["nodes"]):
        text.append(f"at most, should spot machines cost as much as others: {_money(cost['ceiling'])}")
    text += [f"  {line}" for line in _idle_lines(plan["nodes"])]
    if plan["reach"]:
        text.append(f"who can reach what, {'with the token' if plan['token'] else 'WITHOUT ANY TOKEN'}:")
    text += [f"  {'EVERYBODY: ' if way['open'] else ''}{way['who']}: {way['what']}" for way in plan["reach"]]
    text += [f"unknown: {line}" for line in plan["unknown"]]
    text += [f"note: {line}" for line in plan["notes"]]
    if plan["nodes"]:
        prices = plan["prices"]
        text.append(f"prices of {prices['date']}, without disks, traffic and storage. {prices['note'] or ''}".rstrip())
    return text


def _node_line(node: dict) -> str:
    count = "" if node["head"] else f"{node['min']}-{node['max']} x "
    size = [f"{node['cpus']:g} CPUs"] if node["cpus"] else []
    size += [f"{node['gpus']:g} x {node['gpu'] or 'GPU'}"] if node["gpus"] else []
    has = f" ({', '.join(size)})" if size else ""
    usd = node["usd_hour"]
    price = f"${usd['spot' if node['market'] == 'spot' else 'on_demand']:.2f}/h each" if usd else "price unknown"
    if usd and node["market"] == "spot":
        price += f" (on demand ${usd['on_demand']:.2f})"
    priority = f", priority {node['priority']}" if node["priority"] else ""
    machine = node["machine"] or "a machine not named"
    return f"{node['name']}: {count}{machine}{has}, {node['market'] or 'market not said'}, {price}{priority}"


def _money(cost: dict) -> str:
    made = ", ".join(f"{count} {name}" for name, count in cost["nodes"].items() if count) or "no machines"
    if cost["usd_hour"] is None:
        return f"unknown, ${cost['known_usd_hour']:.2f}/h of it known ({made})"
    return f"${cost['usd_hour']:.2f}/h ({made})"


def _idle_lines(nodes: list[dict]) -> list[str]:
    found = []
    for node in nodes:
        if node["head"] or not node["max"]:
            continue
        if node["idle_s"] is None or node["min"] >= node["max"]:
            found.append(f"{node['name']}: {node['max']} stand, they do not scale")
        else:
            left = f"down to {node['min']}" if node["min"] else "to zero"
            found.append(f"{node['name']} scales {left}: each goes after {node['idle_s'] / 60:g} min without work")
    return found
