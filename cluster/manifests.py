"""Reads a KubeRay manifest: RayCluster, RayJob or RayCronJob, and what lies beside it of services and policies.

github.com/ray-project/kuberay, v1.7: ray-operator/apis/ray/v1/raycluster_types.go, rayjob_types.go
"""

from cluster.facts import Facts, Node, Way, at, dicts

KINDS = ("RayCluster", "RayJob", "RayCronJob")
_SPOT = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "cloud.google.com/gke-preemptible": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
_PORTS = "dashboard and jobs, 8265, the cluster's store, 6379, and clients, 10001"
_IDLE_S = 60.0  # the autoscaler's own


def read(documents: list[dict], beside: list[dict] = ()) -> Facts:
    """The one cluster of `documents`; `beside`: documents of other files that may hold its policies.

    ValueError if there is none or more than one, or a count is no number.
    """
    ours = [one for one in documents if one.get("kind") in KINDS and str(one.get("apiVersion")).startswith("ray.io/")]
    if len(ours) != 1:
        raise ValueError(f"holds {len(ours)} of {', '.join(KINDS)}: give a file with one")
    kind, spec = ours[0]["kind"], ours[0].get("spec") or {}
    job = at(spec, "jobTemplate") if kind == "RayCronJob" else spec if kind == "RayJob" else None
    notes = []
    if selector := at(job, "clusterSelector"):
        notes.append(f"runs on the standing cluster with the labels {_labels(selector)}, and makes no machines itself")
    cluster = spec if job is None else at(job, "rayClusterSpec")
    if not selector and not isinstance(at(cluster, "headGroupSpec"), dict):
        raise ValueError(f"{kind} has no headGroupSpec{'' if job is None else ' in a rayClusterSpec'}")
    cluster = {} if selector else cluster
    stands = job is None or at(job, "shutdownAfterJobFinishes") is not True
    if cluster and not stands:
        notes.append("the cluster lives while its job runs: at rest, between jobs, there is none")
    nodes = _nodes(cluster, stands)
    if nodes:
        notes.append("each pod is priced as a machine of its own: several may share one")
    ways = _ways(cluster, [*documents, *beside]) if cluster else []
    if cluster and ways != _ways(cluster, documents):
        notes.append("the NetworkPolicy is in another file of this folder, and holds once that is applied")
    name = str(at(ours[0], "metadata", "name") or "")
    workers = sum(node.most for node in nodes if not node.head)
    return Facts(kind, name, "", "", nodes, workers, at(cluster, "authOptions", "mode") == "token", ways, [], notes)


def _nodes(cluster: dict, stands: bool) -> list[Node]:
    if not cluster:
        return []
    scales = cluster.get("enableInTreeAutoscaling") is True
    common = _count(_mapping(cluster.get("autoscalerOptions")), "idleTimeoutSeconds", "autoscalerOptions")
    # A head that goes with its job: no machine at rest, one at most.
    nodes = [Node("head", least=int(stands), most=1, head=True, **_pod(at(cluster, "headGroupSpec", "template")))]
    for group in dicts(cluster.get("workerGroupSpecs")):
        name = str(group.get("groupName"))
        count = {key: _count(group, key, name) for key in ("replicas", "minReplicas", "maxReplicas", "numOfHosts")}
        hosts = count["numOfHosts"] or 1
        least, most = (count["minReplicas"], count["maxReplicas"]) if scales else (count["replicas"], count["replicas"])
        least, most = (0, 0) if group.get("suspend") is True else (least or 0, most or 0)
        idle = _count(group, "idleTimeoutSeconds", name) if scales else None
        idle = (_IDLE_S if common is None else common) if scales and idle is None else idle
        nodes.append(
            Node(name, least=least * hosts * stands, most=most * hosts, idle_s=idle,
                 priority=_count(group, "priority", name) or 0, **_pod(group.get("template")))
        )  # fmt: skip
    return nodes


def _count(group: dict, key: str, name: str) -> int | None:
    found = group.get(key)
    if found is None or (isinstance(found, int) and not isinstance(found, bool)):
        return found
    raise ValueError(f"{name}: {key} {found!r} is no number")


def _pod(template) -> dict:
    """What `Node` takes of a pod: its selectors name the machine and the market, its limits the CPUs and GPUs."""
    wanted = {**_mapping(at(template, "spec", "nodeSelector"))}
    terms = at(template, "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution",
               "nodeSelectorTerms")  # fmt: skip
    for rule in dicts(at(terms, 0, "matchExpressions")):
        if rule.get("operator") == "In" and isinstance(rule.get("values"), list) and len(rule["values"]) == 1:
            wanted[rule.get("key")] = rule["values"][0]
    box = at(template, "spec", "containers", 0, "resources")
    limits = {**_mapping(at(box, "requests")), **_mapping(at(box, "limits"))}
    gpus, machine = limits.get("nvidia.com/gpu"), wanted.get("node.kubernetes.io/instance-type")
    spot = any(wanted.get(key) == value for key, value in _SPOT.items())
    return {
        "machine": str(machine) if machine else None,
        "market": "spot" if spot else "on-demand" if set(wanted) & set(_SPOT) else None,
        "cpus": _cores(limits.get("cpu")),
        "gpus": None if gpus is None else _cores(gpus),
    }


def _mapping(found) -> dict:
    return found if isinstance(found, dict) else {}


def _cores(said) -> float | None:
    """4, "4", "500m" -> cores; None for what cannot be read."""
    text = str(said)
    try:
        return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    except ValueError:
        return None


def _ways(cluster: dict, documents: list[dict]) -> list[Way]:
    head = _mapping(cluster.get("headGroupSpec"))
    ways = []
    service = head.get("serviceType") or at(head, "headService", "spec", "type") or "ClusterIP"
    if service != "ClusterIP":
        ways.append(Way(f"whoever reaches the {service} service of the head", _PORTS, True))
    if head.get("enableIngress") is True:
        ways.append(Way("whoever reaches the head's Ingress", "dashboard and jobs, 8265", True))
    for one in documents:
        if one.get("kind") == "Ingress":
            ways.append(Way(f"whoever reaches Ingress {at(one, 'metadata', 'name')}", "what it routes to", True))
        if one.get("kind") == "Service" and at(one, "spec", "type") in ("LoadBalancer", "NodePort"):
            ways.append(
                Way(f"whoever reaches {one['spec']['type']} service {at(one, 'metadata', 'name')}", _PORTS, True)
            )
    labels = {"ray.io/node-type": "head", **_mapping(at(head, "template", "metadata", "labels"))}
    policies = [one for one in documents if one.get("kind") == "NetworkPolicy" and _selects(one, labels)]
    if not policies:
        return [*ways, Way("every pod of the Kubernetes cluster, by no NetworkPolicy found here", _PORTS)]
    return ways + [way for one in policies for way in _admitted(one)]


def _selects(policy: dict, labels: dict) -> bool:
    """Whether the policy limits who comes in to pods with `labels`; no, if that is more than a look at labels."""
    kinds, selector = at(policy, "spec", "policyTypes") or ["Ingress"], at(policy, "spec", "podSelector")
    wanted = _mapping(at(selector, "matchLabels"))
    return (
        "Ingress" in kinds
        and not at(selector, "matchExpressions")
        and all(labels.get(key) == value for key, value in wanted.items())
    )


def _admitted(policy: dict) -> list[Way]:
    """None: nobody comes in."""
    ways, by = [], f"NetworkPolicy {at(policy, 'metadata', 'name')}"
    for rule in dicts(at(policy, "spec", "ingress")):
        ports = ", ".join(str(port.get("port")) for port in dicts(rule.get("ports"))) or "all ports"
        for peer in dicts(rule.get("from")) or [{}]:
            block = at(peer, "ipBlock", "cidr")
            who = [str(block)] if block else []
            if (pods := peer.get("podSelector")) is not None:
                who.append(f"pods {_labels(at(pods, 'matchLabels'))}")
            if (spaces := peer.get("namespaceSelector")) is not None:
                who.append(f"of namespaces {_labels(at(spaces, 'matchLabels'))}")
            everybody = block in ("0.0.0.0/0", "::/0")
            ways.append(
                Way(
                    " ".join(who) or "everybody in the Kubernetes cluster and around it", f"{ports}, by {by}", everybody
                )
            )
    return ways or [Way("nobody", f"by {by}")]


def _labels(found) -> str:
    return ", ".join(f"{key}={value}" for key, value in found.items()) if isinstance(found, dict) and found else "any"
