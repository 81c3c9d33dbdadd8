"""Kubernetes' own kinds: its API's schema by kubernetes-validate, and the traps of scheduled and exposed work."""

import re

from cluster.lint.finding import Finding, image_trouble, items, mapping, secrets

_VERSION = "1.32"


def findings(path: str, document: dict) -> list[Finding]:
    kind = str(document.get("kind"))
    name = f"{kind} {mapping(document.get('metadata')).get('name', '?')}"
    found = [Finding(path, name, "schema", message) for message in against_the_api(document)]
    found += [Finding(path, f"{name} {where}", "secret", message) for where, message in secrets(document)
              if kind != "Secret"]  # fmt: skip
    spec = mapping(document.get("spec"))
    if kind == "CronJob":
        found += _cron(path, name, spec)
    if (
        kind in ("ClusterRoleBinding", "RoleBinding")
        and mapping(document.get("roleRef")).get("name") == "cluster-admin"
    ):
        found.append(Finding(path, name, "full-access-role", "cluster-admin may do everything: give a role of its own"))
    if kind in ("ClusterRole", "Role"):
        for rule in items(document.get("rules")):
            if "*" in items(mapping(rule).get("verbs")) and "*" in items(mapping(rule).get("resources")):
                found.append(Finding(path, name, "full-access-role", "every verb on every resource: name those needed"))
    heads = any(mapping(port).get("port") in (8265, 6379, 10001) for port in items(spec.get("ports")))
    if kind == "Service" and spec.get("type") in ("LoadBalancer", "NodePort") and heads:
        found.append(Finding(path, name, "open-dashboard", f"{spec['type']} shows a Ray head to the world: ClusterIP"))
    if (pod := _pod(document)) is not None:
        found += of_pod(path, name, pod)
    return found


def against_the_api(document: dict) -> list[str]:
    """What Kubernetes' API would refuse."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, _VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        at = ".".join(map(str, getattr(error, "path", ())))
        return [f"{at + ': ' if at else ''}{' '.join(str(error.message).split())[:300]}"]
    except Exception as error:  # kinds of other makers, documents that are none
        return [f"no kind that Kubernetes {_VERSION} knows: {' '.join(str(error).split())[:200]}"]
    return []


def _pod(document: dict) -> dict | None:
    """The pod's spec inside a workload, if it is one."""
    spec = mapping(document.get("spec"))
    if document.get("kind") == "Pod":
        return spec
    if document.get("kind") == "CronJob":
        spec = mapping(mapping(spec.get("jobTemplate")).get("spec"))
    template = spec.get("template")
    return mapping(mapping(template).get("spec")) if isinstance(template, dict) else None


def _cron(path: str, name: str, spec: dict) -> list[Finding]:
    found = []
    if spec.get("concurrencyPolicy") != "Forbid":
        found.append(Finding(path, name, "overlap", "concurrencyPolicy: Forbid, or a slow night meets the next"))
    if not spec.get("startingDeadlineSeconds"):
        found.append(Finding(path, name, "missed-ticks", "startingDeadlineSeconds is missing: after 100 missed ticks "
                             "Kubernetes never starts it again"))  # fmt: skip
    if not spec.get("timeZone"):
        found.append(Finding(path, name, "no-time-zone", "timeZone is missing: the hour is the control plane's"))
    return found + schedule(path, name, spec)


def schedule(path: str, name: str, spec: dict) -> list[Finding]:
    """The `TZ=` that cron libraries know and Kubernetes refuses."""
    if re.search(r"TZ=", str(spec.get("schedule", ""))):
        return [Finding(path, name, "no-time-zone", "TZ= inside schedule is refused: use timeZone")]
    return []


def of_pod(path: str, name: str, pod: dict) -> list[Finding]:
    """Traps of any pod: images, host's network, privileges, secrets as plain values."""
    from cluster import exposure

    found = []
    if pod.get("hostNetwork"):
        found.append(Finding(path, name, "host-network", "hostNetwork: the pod listens on the node's addresses"))
    for container in [*items(pod.get("containers")), *items(pod.get("initContainers"))]:
        box, where = mapping(container), f"{name} {mapping(container).get('name', '?')}"
        if mapping(box.get("securityContext")).get("privileged"):
            found.append(Finding(path, where, "privileged", "privileged: the container owns the node"))
        if trouble := image_trouble(str(box.get("image", ""))):
            found.append(Finding(path, where, *trouble))
        for variable in items(box.get("env")):
            key, value = mapping(variable).get("name"), mapping(variable).get("value")
            if isinstance(key, str) and isinstance(value, str):
                try:
                    exposure.refuse_variable(key, value)
                except ValueError:
                    found.append(Finding(path, where, "secret", f"env {key} holds a secret: valueFrom: secretKeyRef"))
    return found
