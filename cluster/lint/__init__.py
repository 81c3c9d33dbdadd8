"""Finds what would go wrong, cost money or let strangers in, in the files that describe a cluster; offline.

Files of `ray up` are held against Ray's own schema, Kubernetes' kinds against its API's (kubernetes-validate),
KubeRay's against built-in rules, or against its CRDs where a folder of them is given; and all against known traps.
"""

from cluster.lint import kuberay, kubernetes, ray_up
from cluster.lint.finding import Finding
from cluster.reading import documents

__all__ = ["Finding", "lint"]


def lint(paths: list[str], crds: str | None = None) -> list[Finding]:
    """What is wrong with files that belong together; [] if nothing is. crds: a folder with KubeRay's
    CustomResourceDefinitions.

    Raises FileNotFoundError, IsADirectoryError, or ValueError for a file that describes no cluster.
    """
    found: list[Finding] = []
    everything = [(path, document) for path in paths for document in documents(path)]
    for path, document in everything:
        if "apiVersion" not in document:
            found += ray_up.findings(path, document)
        elif str(document["apiVersion"]).startswith("ray.io/"):
            found += kuberay.findings(path, document, crds)
        else:
            found += kubernetes.findings(path, document)
    return found + kuberay.together(everything)
