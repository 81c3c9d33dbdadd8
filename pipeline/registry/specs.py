"""Names of models, as people give them: models:NAME@champion."""

import os
import re

from pipeline import storage
from pipeline.registry.champions import champion
from pipeline.registry.places import NAME
from pipeline.registry.versions import has, names, version_path

_SPEC = re.compile(r"models:(?:(?P<root>.+)/)?(?P<name>[^/@]+)(?:@(?P<version>[^/@]+))?")
CHAMPION = "champion"


def is_spec(text: str) -> bool:
    """Whether this names a model of a registry, as models:NAME@champion does."""
    return text.startswith("models:")


def parse(spec: str) -> tuple[str, str, str]:
    """(root, name, version or champion) of models:[ROOT/]NAME[@VERSION]; root by MILLSTREAM_MODELS if not said.

    ValueError for what is none, or without a root.
    """
    match = _SPEC.fullmatch(spec)
    if not match or not NAME.fullmatch(match["name"]):
        raise ValueError(f"{spec!r}: write models:NAME@champion, models:NAME@VERSION or models:s3://bucket/models/NAME")
    root = match["root"] or os.environ.get("MILLSTREAM_MODELS", "")
    if not root:
        raise ValueError(f"{spec}: say where the models are, by MILLSTREAM_MODELS or as models:s3://bucket/models/NAME")
    root = root.rstrip("/") if storage.is_remote(root) else os.path.abspath(os.path.expanduser(root))
    return root, match["name"], match["version"] or CHAMPION


def resolve(spec: str) -> str:
    """The path of the version that `spec` names now. ValueError if there is none."""
    root, name, version = parse(spec)
    if version == CHAMPION:
        version = champion(root, name).version
        if version is None:
            there = f"there are {', '.join(names(root))}" if name not in names(root) and names(root) else "promote one"
            raise ValueError(f"{name} has no champion in {root}: {there}")
    if not has(root, name, version):
        raise ValueError(f"{name} has no version {version} in {root}")
    return version_path(root, name, version)
