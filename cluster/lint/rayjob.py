"""A RayJob's own rules by KubeRay's validation.go, and what it gives away: Ray shows a job to whoever lists jobs."""

from cluster import reading
from cluster.lint.finding import mapping, named_like_a_secret, number


def check(job: dict, where: str, trap) -> None:
    """Tells `trap` (name, where, message) of what is wrong with the spec of a RayJob."""
    _goes_together(job, where, trap)
    _deletion(job, where, trap)
    for field, least in (("ttlSecondsAfterFinished", 0), ("activeDeadlineSeconds", 1), ("backoffLimit", 0)):
        if field in job and number(job[field]) < least:
            trap("schema", f"{where}.{field}", f"{job[field]!r}: at least {least}")
    _runtime_env(job, f"{where}.runtimeEnvYAML", trap)


def _goes_together(job: dict, where: str, trap) -> None:
    chosen, shut, mode = job.get("clusterSelector"), job.get("shutdownAfterJobFinishes"), job.get("submissionMode")
    if bool(chosen) == ("rayClusterSpec" in job):
        trap("schema", where, "give rayClusterSpec, or clusterSelector, and not both")
    for field in ("suspend", "ttlSecondsAfterFinished"):
        if job.get(field) and not shut:
            trap("schema", f"{where}.{field}", f"{field} needs shutdownAfterJobFinishes: true")
    for field in ("backoffLimit", "suspend"):
        if chosen and job.get(field):
            trap("schema", f"{where}.{field}", f"{field} does not go with clusterSelector")
    if chosen and not mapping(chosen).get("ray.io/cluster"):
        trap("schema", f"{where}.clusterSelector", "name the cluster: {ray.io/cluster: NAME}")
    if mode == "InteractiveMode" and job.get("backoffLimit"):
        trap("schema", f"{where}.backoffLimit", "backoffLimit does not go with InteractiveMode")
    for field in ("clusterSelector", "submitterPodTemplate", "submitterConfig"):
        if mode == "SidecarMode" and job.get(field):
            trap("schema", f"{where}.submissionMode", f"SidecarMode does not go with {field}")


def _deletion(job: dict, where: str, trap) -> None:
    chosen, shut = job.get("clusterSelector"), job.get("shutdownAfterJobFinishes")
    strategy = job.get("deletionStrategy")
    rules, ends = mapping(strategy).get("deletionRules"), {"onSuccess", "onFailure"} & mapping(strategy).keys()
    if rules and shut:
        trap("schema", f"{where}.deletionStrategy", "deletionRules do not go with shutdownAfterJobFinishes")
    if strategy is not None and (bool(rules) == bool(ends) or len(ends) == 1):
        trap("schema", f"{where}.deletionStrategy", "give deletionRules, or both onSuccess and onFailure")
    if not chosen and not shut and not rules:
        trap("never-zero", where, "shutdownAfterJobFinishes: true, or the cluster stays when the job has ended")


def _runtime_env(job: dict, where: str, trap) -> None:
    try:
        given = next(iter(reading.parse(str(job.get("runtimeEnvYAML") or ""))), None)
    except ValueError as error:
        trap("schema", where, str(error))
        return
    if given is not None and not isinstance(given, dict):
        trap("schema", where, "is no mapping")
    for key, value in mapping(mapping(given).get("env_vars")).items():
        if named_like_a_secret(str(key), str(value)):
            trap("secret", where, f"{key} holds a secret, and Ray shows it to everybody: use the pods' env")
