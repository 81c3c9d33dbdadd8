"""KubeRay's kinds, by the rules of its operator 1.7 as far as they can be told without a cluster, by its CRDs where a
folder of them is given, and by what stops a run from saving, or lets strangers in.

github.com/ray-project/kuberay: ray-operator/controllers/ray/utils/validation.go
"""

import difflib
import re
from importlib.metadata import version

from cluster.lint import crds as schemas
from cluster.lint import kubernetes, rayjob
from cluster.lint.finding import Finding, items, mapping, number, seconds, secrets

_NAMES = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "RayService": 47}
_FIELDS = {
    "RayCluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions upgradeStrategy "
    "workerGroupSpecs",
    "RayJob": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec "
    "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
    "ttlSecondsAfterFinished",
    "RayCronJob": "schedule jobTemplate timeZone suspend",
    "head": "enableIngress headService ingressOptions labels rayStartParams resources serviceType template",
    "group": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams replicas "
    "resources scaleStrategy suspend template",
    "autoscaler": "args command env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext "
    "upscalingMode version volumeMounts",
    "auth": "enableK8sTokenAuth mode secretName",
}
_DRAIN, _STOP = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"
_DRAIN_S, _STOP_S = 30, 3  # Ray's own, where they are unset
_LONGEST_IDLE_S = 3600


def findings(path: str, document: dict, crds: str | None) -> list[Finding]:
    """Of one document. Raises ValueError if the folder `crds` has none for its kind."""
    kind, metadata = str(document.get("kind")), mapping(document.get("metadata"))
    name, spec, found = f"{kind} {metadata.get('name', '?')}", mapping(document.get("spec")), []

    def trap(trap_name: str, where: str, message: str, severity: str = "error") -> None:
        found.append(Finding(path, f"{name} {where}".strip(), trap_name, message, severity))

    if kind not in _NAMES:
        trap("schema", "kind", f"KubeRay knows no {kind}: {', '.join(_NAMES)}")
        return found
    if crds:
        for where, message in schemas.errors(document, crds):
            trap("schema", where, message)
    _named(kind, document, metadata, trap)
    for where, message in secrets(document):
        trap("secret", where, message)
    _known(kind, spec, trap, "spec")
    if kind == "RayCronJob":
        for field in ("schedule", "jobTemplate"):
            if field not in spec:
                trap("schema", "spec", f"{field} is missing")
        kubernetes.schedule(spec, trap)
        _known("RayJob", mapping(spec.get("jobTemplate")), trap, "spec.jobTemplate")
    job = {"RayJob": spec, "RayCronJob": mapping(spec.get("jobTemplate"))}.get(kind)
    where = {"RayCronJob": "spec.jobTemplate.rayClusterSpec", "RayJob": "spec.rayClusterSpec",
             "RayService": "spec.rayClusterConfig"}.get(kind, "spec")  # fmt: skip
    if job is not None:
        rayjob.check(job, where.rpartition(".")[0], trap)
        submitter = f"{where.rpartition('.')[0]}.submitterPodTemplate"
        found += _pod_template(path, name, submitter, job.get("submitterPodTemplate"))
        spec = mapping(job.get("rayClusterSpec"))
    elif kind == "RayService":
        spec = mapping(spec.get("rayClusterConfig"))
    if spec or job is None:
        _cluster(path, name, where, spec, trap, found, goes=bool(job and job.get("shutdownAfterJobFinishes")))
    return found


def together(everything: list[tuple[str, dict]]) -> list[Finding]:
    """What is missing beside the clusters of all files."""
    if any(document.get("kind") == "PodDisruptionBudget" for _, document in everything):
        return []
    why = "no PodDisruptionBudget beside it: an upgrade of the nodes may take the head and every worker at once"
    clusters = [path for path, document in everything if document.get("kind") == "RayCluster"]
    return [Finding(path, "the whole file", "no-disruption-budget", why, "warning") for path in dict.fromkeys(clusters)]


def _named(kind: str, document: dict, metadata: dict, trap) -> None:
    if document.get("apiVersion") != "ray.io/v1":
        trap("schema", "apiVersion", f"{document.get('apiVersion')!r}: ray.io/v1 is served")
    given = str(metadata.get("name") or metadata.get("generateName") or "")
    if len(given) > _NAMES[kind]:
        trap("long-name", "metadata.name", f"at most {_NAMES[kind]} characters: pods' names are made of it")
    elif not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?-?", given):
        trap("schema", "metadata.name", f"{given!r}: small letters, digits and -, a letter first")


def _known(kind: str, node: dict, trap, where: str) -> None:
    fields = _FIELDS.get(kind, "").split()
    for field in node if fields else ():
        if field not in fields:
            near = difflib.get_close_matches(str(field), fields, n=1)
            trap("schema", where, f"no field {field!r}{f': did you mean {near[0]}?' if near else ''}")


def _cluster(path: str, name: str, where: str, spec: dict, trap, found: list[Finding], goes: bool) -> None:
    """goes: whether the cluster ends with its job, and what idles in it before is little."""
    head, groups = mapping(spec.get("headGroupSpec")), [mapping(g) for g in items(spec.get("workerGroupSpecs"))]
    auto, auth = mapping(spec.get("autoscalerOptions")), mapping(spec.get("authOptions"))
    if where != "spec":
        _known("RayCluster", spec, trap, where)
    for kind, node, at in (("head", head, "headGroupSpec"), ("autoscaler", auto, "autoscalerOptions"),
                           ("auth", auth, "authOptions")):  # fmt: skip
        _known(kind, node, trap, f"{where}.{at}")
    if not mapping(head.get("template")):
        trap("schema", f"{where}.headGroupSpec", "a template is missing")
    _token(spec, auth, trap, where)
    _doors(head, trap, f"{where}.headGroupSpec")
    scales = spec.get("enableInTreeAutoscaling")
    if groups and not scales:
        severity = "warning" if goes else "error"
        trap("never-zero", f"{where}.enableInTreeAutoscaling", "workers stay up without work: true", severity)
    if number(auto.get("idleTimeoutSeconds")) > _LONGEST_IDLE_S:
        trap("idle-timeout", f"{where}.autoscalerOptions", f"{auto['idleTimeoutSeconds']} s without work are paid for")
    if str(spec.get("rayVersion", version("ray"))) != version("ray"):
        trap("ray-version", f"{where}.rayVersion", f"{spec['rayVersion']!r}, jobs are submitted with {version('ray')}")
    if str(mapping(head.get("rayStartParams")).get("num-cpus")) != "0":
        why = 'rayStartParams: {num-cpus: "0"}, or work starves the head'
        trap("work-on-head", f"{where}.headGroupSpec", why, "warning")
    stop = _variable(_spec(head), _STOP, _STOP_S)
    if stop is not None and stop < 30:
        trap("missing-grace", f"{where}.headGroupSpec", f"a job that is stopped is killed after {stop} s: set {_STOP} "
             "to 120, so that it can save")  # fmt: skip
    found += kubernetes.of_pod(path, f"{name} autoscalerOptions", {"containers": [auto]})
    for at, group in (("headGroupSpec", head), *((f"workerGroupSpecs.{at}", g) for at, g in enumerate(groups))):
        found += _pod_template(path, name, f"{where}.{at}.template", group.get("template"))
        _start(group, trap, f"{where}.{at}")
        restart = _spec(group).get("restartPolicy", "Never")
        if scales and auto.get("version") != "v1" and restart != "Never":
            trap("restart-policy", f"{where}.{at}", f"restartPolicy {restart}: autoscaler v2 makes new pods and does "
                 "not know restarted ones: Never")  # fmt: skip
    for at, group in enumerate(groups):
        _group(group, trap, f"{where}.workerGroupSpecs.{at}")


def _token(spec: dict, auth: dict, trap, where: str) -> None:
    if auth.get("mode") != "token":
        trap("no-token", f"{where}.authOptions", "without a token, whoever reaches the head runs code on it: "
             "{mode: token, secretName: ...}")  # fmt: skip
    elif not spec.get("rayVersion"):
        trap("schema", f"{where}.authOptions", "mode token needs rayVersion")
    if auth.get("enableK8sTokenAuth") and where != "spec" and "ervice" not in where:
        trap("schema", f"{where}.authOptions", "enableK8sTokenAuth does not go with a RayJob")


def _doors(head: dict, trap, where: str) -> None:
    kinds = [head.get("serviceType"), mapping(mapping(head.get("headService")).get("spec")).get("type")]
    for kind in kinds:
        if kind in ("LoadBalancer", "NodePort"):
            trap("open-dashboard", where, f"a service of type {kind} shows the head to the world: ClusterIP")
    if head.get("enableIngress"):
        trap("open-dashboard", where, "enableIngress shows the dashboard to the world: kubectl port-forward")


def _start(group: dict, trap, where: str) -> None:
    """What holds for the head and for workers: labels and resources are told once, Ray's parameters are text."""
    start = mapping(group.get("rayStartParams"))
    for key, value in start.items():
        if not isinstance(value, str):
            trap("schema", f"{where}.rayStartParams", f'{key}: {value!r} must be text: "{value}"')
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & start.keys():
        trap("schema", where, "give resources, or rayStartParams' num-cpus and its kin, and not both")
    if "labels" in start:
        trap("schema", f"{where}.rayStartParams", "labels are a field of the group")


def _group(group: dict, trap, where: str) -> None:
    for field in ("groupName", "template", "minReplicas", "maxReplicas"):
        if field not in group:
            trap("schema", where, f"{field} is missing")
    _known("group", group, trap, where)
    most, least = group.get("maxReplicas"), group.get("minReplicas", 0)
    if isinstance(most, int) and isinstance(least, int) and least > most:
        trap("schema", where, f"minReplicas {least} above maxReplicas {most}")
    if number(least) > 0:
        trap("never-zero", where, f"{least} nodes stay up without work", "warning")
    if number(group.get("idleTimeoutSeconds")) > _LONGEST_IDLE_S:
        trap("idle-timeout", where, f"idleTimeoutSeconds {group['idleTimeoutSeconds']}: idle nodes are paid for")
    if not (pod := _spec(group)):
        return
    grace, drain = pod.get("terminationGracePeriodSeconds", 30), _variable(pod, _DRAIN, _DRAIN_S) or 0
    hook = str(mapping(_ray(pod).get("lifecycle")).get("preStop") or "")
    if not re.search(r"cluster\.preemption|drain", hook):
        trap("no-drain", where, "no preStop hook drains the node: python -m cluster.preemption --now --deadline ...")
    named = re.search(r"--deadline\W+(\d{1,9})\b", hook)
    hooked = int(named[1]) if named else 0
    if number(grace) <= drain or number(grace) < drain + hooked:
        also = f" and preStop's {hooked} s together" if hooked else ""
        trap("missing-grace", where, f"terminationGracePeriodSeconds {grace} must be above {_DRAIN}'s {drain} s{also}, "
             "so that training saves")  # fmt: skip


def _pod_template(path: str, name: str, where: str, template) -> list[Finding]:
    """What is wrong with the pods of a template, by Kubernetes' API and by the traps of any pod."""
    if not (pod := mapping(mapping(template).get("spec"))):
        return []
    found = kubernetes.of_pod(path, f"{name} {where}", pod)
    metadata = {"name": "any"} | mapping(mapping(template).get("metadata"))
    trouble = kubernetes.against_the_api({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod})
    if not trouble and not items(pod.get("containers")):
        trouble = ("spec", "no containers")
    return found + ([Finding(path, f"{name} {where}.{trouble[0]}", "schema", trouble[1])] if trouble else [])


def _spec(group: dict) -> dict:
    return mapping(mapping(group.get("template")).get("spec"))


def _ray(pod: dict) -> dict:
    """The container that runs Ray: KubeRay takes the first."""
    return mapping((items(pod.get("containers")) or [None])[0])


def _variable(pod: dict, name: str, unset: int) -> int | None:
    """Seconds a variable of Ray's container holds; None if that cannot be told here."""
    if not (box := _ray(pod)) or "envFrom" in box:
        unset = None
    for variable in map(mapping, items(box.get("env"))):
        if variable.get("name") == name:
            return None if "valueFrom" in variable else seconds(variable.get("value")) or 0
    return unset
