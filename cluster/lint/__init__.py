"""Finds what would go wrong, cost money or let strangers in, in the files that describe a cluster; offline.

Files of `ray up` are held against Ray's own schema, Kubernetes' kinds against its API's (kubernetes-validate),
KubeRay's against built-in rules, or against its CRDs where a folder of them is given; and all against known traps.
"""

from pathlib import Path

import yaml

from cluster.lint import kuberay, kubernetes, ray_up
from cluster.lint.finding import Finding

__all__ = ["Finding", "documents", "lint"]
_MOST_BYTES = 2 << 20
_MOST_ALIASES = 200  # a few lines of nested aliases are gigabytes when walked


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


def documents(path: str) -> list[dict]:
    """The YAML documents of a cluster file. Raises as `lint` does."""
    data = Path(path).read_bytes()
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path}: {len(data) >> 20} MB are too large for a cluster file")
    try:
        text = data.decode()
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.CSafeLoader)) > _MOST_ALIASES:
            raise ValueError(f"{path}: more than {_MOST_ALIASES} aliases")
        found = [document for document in yaml.load_all(text, yaml.CSafeLoader) if document is not None]
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    if not found:
        raise ValueError(f"{path}: empty")
    for document in found:
        cluster = isinstance(document, dict) and ({"cluster_name", "provider"} & document.keys())
        if not (cluster or (isinstance(document, dict) and {"apiVersion", "kind"} <= document.keys())):
            raise ValueError(
                f"{path}: neither a `ray up` file (cluster_name, provider) nor Kubernetes' (apiVersion, kind)"
            )
    return found
