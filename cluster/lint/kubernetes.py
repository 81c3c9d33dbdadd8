"""Kubernetes' own kinds: its API's schema by kubernetes-validate, and the traps of scheduled and exposed work."""

import re

from cluster.lint.finding import Finding, image_trouble, items, mapping, named_like_a_secret, secrets

_VERSION = "1.37"
_DOORS = {
    8265,
    6379,
    10001,
    "dashboard",
    "gcs-server",
    "client",
}  # ports of a Ray head, by number and by KubeRay's name


def findings(path: str, document: dict) -> list[Finding]:
    kind, spec = str(document.get("kind")), mapping(document.get("spec"))
    name = f"{kind} {mapping(document.get('metadata')).get('name', '?')}"
    found = []

    def trap(trap_name: str, where: str, message: str, severity: str = "error") -> None:
        found.append(Finding(path, f"{name} {where}".strip(), trap_name, message, severity))

    if trouble := against_the_api(document):
        other = "." in str(document.get("apiVersion")).partition("/")[0] and trouble[1].startswith("no schema")
        trap("unchecked" if other else "schema", *trouble, "warning" if other else "error")
    if kind != "Secret":
        for where, message in secrets(document):
            trap("secret", where, message)
    if kind == "CronJob":
        _cron(spec, trap)
    if (
        kind in ("ClusterRoleBinding", "RoleBinding")
        and mapping(document.get("roleRef")).get("name") == "cluster-admin"
    ):
        trap("full-access-role", "roleRef", "cluster-admin may do everything: give a role of its own")
    if kind in ("ClusterRole", "Role"):
        for at, rule in enumerate(items(document.get("rules"))):
            everything = "*" in items(mapping(rule).get("resources"))  # with any verb: one that reads has all secrets
            if everything and ({"*", ""} & {str(group) for group in items(mapping(rule).get("apiGroups"))}):
                trap("full-access-role", f"rules.{at}", "resources *, secrets among them: name those needed")
    if kind == "Service" and spec.get("type") in ("LoadBalancer", "NodePort") and _before_a_head(spec):
        trap("open-dashboard", "spec.type", f"{spec['type']} shows a Ray head to the world: ClusterIP")
    if (pod := _pod(document)) is not None:
        found += of_pod(path, name, pod)
    return found


def against_the_api(document: dict) -> tuple[str, str] | None:
    """(where, message) of what Kubernetes' API would refuse."""
    import kubernetes_validate

    if not re.fullmatch(r"[A-Za-z]+", str(document.get("kind"))):  # it becomes a file's name
        return "kind", f"{document.get('kind')!r} is no kind"
    try:
        kubernetes_validate.validate(document, _VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return ".".join(map(str, error.absolute_path)), " ".join(str(error.message).split())[:300]
    except kubernetes_validate.SchemaNotFoundError:
        return "", f"no schema of {document['kind']} in {document['apiVersion']!r} comes with Kubernetes {_VERSION}"
    except Exception as error:  # what it trips over, as a key that is no text, is an error of the file
        return "", f"cannot be checked: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return None


def _before_a_head(service: dict) -> bool:
    doors = {str(door) for door in _DOORS}
    ports = [mapping(port).get(key) for port in items(service.get("ports")) for key in ("port", "targetPort")]
    head = mapping(service.get("selector")).get("ray.io/node-type") == "head"
    return head or any(str(port) in doors for port in ports)


def _pod(document: dict) -> dict | None:
    """The pod's spec inside a workload, if it is one."""
    spec = mapping(document.get("spec"))
    if document.get("kind") == "Pod":
        return spec
    if document.get("kind") == "CronJob":
        spec = mapping(mapping(spec.get("jobTemplate")).get("spec"))
    template = spec.get("template")
    return mapping(mapping(template).get("spec")) if isinstance(template, dict) else None


def _cron(spec: dict, trap) -> None:
    if spec.get("concurrencyPolicy") != "Forbid":
        trap("overlap", "spec", "concurrencyPolicy: Forbid, or a slow night meets the next")
    if not spec.get("startingDeadlineSeconds"):
        why = "startingDeadlineSeconds is missing: after 100 missed ticks Kubernetes never starts it again"
        trap("missed-ticks", "spec", why)
    if not spec.get("timeZone"):
        trap("no-time-zone", "spec", "timeZone is missing: the hour is the control plane's")
    schedule(spec, trap)


def schedule(spec: dict, trap) -> None:
    """A schedule that is none, and the `TZ=` that cron libraries know and Kubernetes refuses."""
    given = spec.get("schedule")
    if "TZ=" in str(given):
        trap("no-time-zone", "spec.schedule", f"{given!r}: TZ= inside a schedule is refused, use timeZone")
    elif isinstance(given, str) and not re.fullmatch(r"@[a-z]+( \w+)?|\S+( +\S+){4}", given.strip()):
        trap("schema", "spec.schedule", f"{given!r}: give minute, hour, day, month, day of the week")


def of_pod(path: str, name: str, pod: dict) -> list[Finding]:
    """Traps of any pod: images, host's network, privileges, secrets as plain values."""
    found = []
    if pod.get("hostNetwork"):
        found.append(Finding(path, name, "host-network", "hostNetwork: the pod listens on the node's addresses"))
    for container in [*items(pod.get("containers")), *items(pod.get("initContainers"))]:
        box, where = mapping(container), f"{name} {mapping(container).get('name', '?')}"
        if mapping(box.get("securityContext")).get("privileged"):
            found.append(Finding(path, where, "privileged", "privileged: the container owns the node"))
        if "image" in box and (trouble := image_trouble(str(box["image"]))):
            found.append(Finding(path, where, *trouble))
        for variable in items(box.get("env")):
            key, value = mapping(variable).get("name"), mapping(variable).get("value")
            if isinstance(key, str) and isinstance(value, str) and named_like_a_secret(key, value):
                found.append(Finding(path, where, "secret", f"env {key} holds a secret: valueFrom: secretKeyRef"))
    return found
