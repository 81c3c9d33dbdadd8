"""KubeRay's kinds, by the rules of its operator 1.7 (validation.go) as far as they can be told without a cluster, by
its CRDs where a folder of them is given, and by what stops a run from saving, or lets strangers in."""

import difflib
import re
from importlib.metadata import version

import yaml

from cluster.lint import crds as schemas
from cluster.lint import kubernetes
from cluster.lint.finding import Finding, items, mapping, secrets

_NAMES = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "RayService": 41}
_FIELDS = {
    "RayCluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations managedBy networkPolicy rayVersion suspend tlsOptions upgradeStrategy workerGroupSpecs",
    "RayJob": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec "
    "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
    "ttlSecondsAfterFinished historyServerOptions",
    "RayCronJob": "schedule jobTemplate timeZone suspend",
    "group": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams replicas "
    "resources scaleStrategy suspend template",
}
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def findings(path: str, document: dict, crds: str | None) -> list[Finding]:
    kind, metadata = str(document.get("kind")), mapping(document.get("metadata"))
    name, spec, found = f"{kind} {metadata.get('name', '?')}", mapping(document.get("spec")), []

    def trap(trap_name: str, where: str, message: str, severity: str = "error") -> None:
        found.append(Finding(path, f"{name} {where}".strip(), trap_name, message, severity))

    if kind not in _NAMES:
        trap("schema", "", f"KubeRay knows no {kind}: {', '.join(_NAMES)}")
        return found
    if crds:
        for where, message in schemas.errors(document, crds):
            trap("schema", where, message)
    if document.get("apiVersion") != "ray.io/v1":
        trap("schema", "apiVersion", f"{document.get('apiVersion')!r}: ray.io/v1 is served")
    if len(str(metadata.get("name", ""))) > _NAMES[kind]:
        trap("long-name", "metadata.name", f"at most {_NAMES[kind]} characters: pods' names are made of it")
    for where, message in secrets(document):
        trap("secret", where, message)
    _known(kind, spec, trap)
    if kind == "RayCronJob":
        for field in ("schedule", "jobTemplate"):
            if field not in spec:
                trap("schema", "spec", f"{field} is missing")
        found += kubernetes.schedule(path, name, spec)
        _job(mapping(spec.get("jobTemplate")), trap)
        spec = mapping(mapping(spec.get("jobTemplate")).get("rayClusterSpec"))
    elif kind == "RayJob":
        _job(spec, trap)
        spec = mapping(spec.get("rayClusterSpec"))
    elif kind == "RayService":
        spec = mapping(spec.get("rayClusterConfig"))
    if spec or kind == "RayCluster":
        found += _cluster(path, name, spec, trap)
    return found


def together(everything: list[tuple[str, dict]]) -> list[Finding]:
    """What is missing beside the clusters of all files."""
    if any(document.get("kind") == "PodDisruptionBudget" for _, document in everything):
        return []
    why = "no PodDisruptionBudget beside it: an upgrade of the nodes may take the head and every worker at once"
    clusters = [path for path, document in everything if document.get("kind") == "RayCluster"]
    return [Finding(path, "the whole file", "no-disruption-budget", why, "warning") for path in dict.fromkeys(clusters)]


def _known(kind: str, spec: dict, trap, where: str = "spec") -> None:
    fields = _FIELDS.get(kind, "").split()
    for field in spec if fields else ():
        if field not in fields:
            near = difflib.get_close_matches(str(field), fields, n=1)
            trap("schema", where, f"no field {field!r}{f': did you mean {near[0]}?' if near else ''}")


def _job(spec: dict, trap) -> None:
    _known("RayJob", spec, trap, "job")
    chosen, shut = spec.get("clusterSelector"), spec.get("shutdownAfterJobFinishes")
    rules = mapping(spec.get("deletionStrategy")).get("deletionRules")
    if bool(chosen) == ("rayClusterSpec" in spec):
        trap("schema", "", "give rayClusterSpec, or clusterSelector, and not both")
    for field, needs in (("suspend", shut), ("ttlSecondsAfterFinished", shut)):
        if spec.get(field) and not needs:
            trap("schema", field, f"{field} needs shutdownAfterJobFinishes: true")
    for field, wrong in (("backoffLimit", chosen), ("suspend", chosen)):
        if wrong and spec.get(field):
            trap("schema", field, f"{field} does not go with clusterSelector")
    if chosen and spec.get("submissionMode") == "SidecarMode":
        trap("schema", "submissionMode", "SidecarMode does not go with clusterSelector")
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit"):
        trap("schema", "backoffLimit", "backoffLimit does not go with InteractiveMode")
    if rules and shut:
        trap("schema", "deletionStrategy", "deletionRules do not go with shutdownAfterJobFinishes")
    if not chosen and not shut and not rules:
        trap("never-zero", "", "shutdownAfterJobFinishes: true, or the cluster stays when the job has ended")
    try:
        variables = mapping(mapping(yaml.safe_load(str(spec.get("runtimeEnvYAML", "")))).get("env_vars"))
    except yaml.YAMLError:
        trap("schema", "runtimeEnvYAML", "is no YAML")
        variables = {}
    for key, value in variables.items():
        if kubernetes.of_pod("", "", {"containers": [{"image": "a:1", "env": [{"name": key, "value": str(value)}]}]}):
            trap("secret", "runtimeEnvYAML", f"{key} holds a secret, and Ray shows it to everybody: use the pods' env")


def _cluster(path: str, name: str, spec: dict, trap) -> list[Finding]:
    found: list[Finding] = []
    _known("RayCluster", spec, trap, "cluster")
    head, groups = mapping(spec.get("headGroupSpec")), [mapping(g) for g in items(spec.get("workerGroupSpecs"))]
    if not mapping(head.get("template")):
        trap("schema", "headGroupSpec", "headGroupSpec with a template is missing")
    auth = mapping(spec.get("authOptions"))
    if auth.get("mode") != "token":
        trap("no-token", "authOptions", "without a token, whoever reaches the head runs code on it: {mode: token, "
             "secretName: ...}")  # fmt: skip
    if head.get("serviceType") in ("LoadBalancer", "NodePort"):
        trap(
            "open-dashboard",
            "headGroupSpec",
            f"serviceType {head['serviceType']} shows the head to the world: ClusterIP",
        )
    if groups and not spec.get("enableInTreeAutoscaling"):
        trap("never-zero", "enableInTreeAutoscaling", "workers stay up without work: true")
    if str(spec.get("rayVersion", version("ray"))) != version("ray"):
        trap("ray-version", "rayVersion", f"{spec['rayVersion']!r}, jobs are submitted with {version('ray')}")
    if str(mapping(head.get("rayStartParams")).get("num-cpus")) != "0":
        trap("work-on-head", "headGroupSpec", 'rayStartParams: {num-cpus: "0"}, or work starves the head', "warning")
    if mapping(head.get("rayStartParams")).get("dashboard-host") == "0.0.0.0" and auth.get("mode") != "token":
        trap("open-dashboard", "headGroupSpec", "the dashboard listens to everybody, without a token")
    pod = _spec(head)
    if pod and int(_variable(pod, "RAY_JOB_STOP_WAIT_TIME_S") or 3) < 30:
        trap(
            "missing-grace", "headGroupSpec", "a job that is stopped is killed after 3 s: RAY_JOB_STOP_WAIT_TIME_S: 120"
        )
    for kind, group in [("head", head), *((str(g.get("groupName", "?")), g) for g in groups)]:
        if pod := _spec(group):
            found += kubernetes.of_pod(path, f"{name} {kind}", pod)
            body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}
            for message in kubernetes.against_the_api(body):
                trap("schema", f"{kind} template", message)
    for group in groups:
        _group(group, trap)
    return found


def _group(group: dict, trap) -> None:
    where = str(group.get("groupName", "?"))
    for field in ("groupName", "template"):
        if not group.get(field):
            trap("schema", where, f"{field} is missing")
    _known("group", group, trap, where)
    most, least = group.get("maxReplicas"), group.get("minReplicas", 0)
    if isinstance(most, int) and isinstance(least, int) and least > most:
        trap("schema", where, f"minReplicas {least} above maxReplicas {most}")
    if isinstance(least, int) and least > 0:
        trap("never-zero", where, f"{least} nodes stay up without work", "warning")
    if not (pod := _spec(group)):
        return
    grace, drain = pod.get("terminationGracePeriodSeconds"), _variable(pod, _DRAIN)
    if not isinstance(grace, int) or grace <= int(drain or 30):
        trap("missing-grace", where, f"terminationGracePeriodSeconds {grace or 30} must be above {_DRAIN} "
             f"({drain or '30, its default'}), so that training saves")  # fmt: skip
    hooks = [mapping(mapping(box).get("lifecycle")).get("preStop") for box in items(pod.get("containers"))]
    if not any(hook and re.search(r"cluster.preemption|drain", str(hook)) for hook in hooks):
        trap("no-drain", where, "no preStop hook drains the node: python -m cluster.preemption --now --deadline ...")


def _spec(group: dict) -> dict:
    return mapping(mapping(group.get("template")).get("spec"))


def _variable(pod: dict, name: str) -> str:
    for box in items(pod.get("containers")):
        for variable in items(mapping(box).get("env")):
            if mapping(variable).get("name") == name and str(mapping(variable).get("value")).isdigit():
                return mapping(variable)["value"]
    return ""
