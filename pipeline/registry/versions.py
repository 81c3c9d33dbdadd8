"""Versions: written once, named by what they hold, checked when they are read."""

import contextlib
import hashlib
import json

from pipeline import storage
from pipeline.registry.places import NAME, listing, place, timestamp


def publish(root: str, name: str, files: dict[str, bytes], model: dict, about: dict) -> str:
    """Stores a version and returns its name. The same files and `model` are the same version, whoever stores them.

    model: what builds it (architecture, classes, preprocessing), plain JSON; about: metrics and where it comes from.
    """
    listed = {file: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()}
    version = _hash(listed, model)
    folder = version_path(root, name, version)
    if not has(root, name, version):
        for file, data in files.items():
            storage.write(storage.join(folder, file), data)
        info = {"version": version, "model": model, "files": listed, **about, "created": timestamp()}
        with contextlib.suppress(FileExistsError):  # another stored the same
            storage.write_new(storage.join(folder, "model.json"), json.dumps(info, indent=1).encode())
    return version


def _hash(files: dict, model: dict) -> str:
    return hashlib.sha256(json.dumps([files, model], sort_keys=True).encode()).hexdigest()[:12]


def has(root: str, name: str, version: str) -> bool:
    return bool(NAME.fullmatch(version)) and storage.exists(
        storage.join(version_path(root, name, version), "model.json")
    )


def describe(path: str) -> dict:
    """model.json of the version at `path`. ValueError if there is none, or it is not what its name says."""
    file = storage.join(path, "model.json")
    try:
        info = json.loads(storage.read(file))
    except FileNotFoundError:
        raise ValueError(f"{path} is no published model (it has no model.json)") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(info, dict) or info.get("version") != _hash(info.get("files", {}), info.get("model", {})):
        raise ValueError(f"{file} was changed after it was published: its content is not that of its version")
    return info


def read_file(path: str, info: dict, name: str) -> bytes:
    """A file of the version at `path`, held against its size and SHA-256. ValueError if it differs, or is missing."""
    file, wanted = storage.join(path, name), info["files"].get(name)
    try:
        data = storage.read(file) if wanted else None
    except FileNotFoundError:
        data = None
    if data is None:
        raise ValueError(f"{file} is missing")
    if len(data) != wanted["size"] or hashlib.sha256(data).hexdigest() != wanted["sha256"]:
        raise ValueError(f"{file} is damaged: it is not what was published")
    return data


def versions(root: str, name: str) -> list[dict]:
    """model.json of every version, the newest first."""
    folder = place(root, name, "versions")
    names = {file.partition("/")[0] for file in listing(folder) if file.endswith("/model.json")}
    found = [describe(storage.join(folder, each)) for each in names]
    return sorted(found, key=lambda info: (info["created"], info["version"]), reverse=True)


def names(root: str) -> list[str]:
    """The models there are."""
    parts = (file.split("/") for file in listing(root))
    return sorted({part[0] for part in parts if part[1:2] in (["versions"], ["champion.json"])})


def version_path(root: str, name: str, version: str) -> str:
    return place(root, name, f"versions/{version}")


def pin(root: str, name: str, version: str, why: str) -> None:
    """Keeps a version, whatever comes after it. ValueError if there is none of that name."""
    if not has(root, name, version):
        raise ValueError(f"{name} has no version {version}")
    storage.write(place(root, name, f"pinned/{version}"), why.encode())


def unpin(root: str, name: str, version: str) -> None:
    storage.delete(place(root, name, f"pinned/{version}"))


def pinned(root: str, name: str) -> dict[str, str]:
    """{version: why}."""
    folder = place(root, name, "pinned")
    return {each: storage.read(storage.join(folder, each)).decode() for each in listing(folder)}
