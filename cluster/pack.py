"""The code of a job as one zip, named by its content: the same code is packed to the same bytes, and sent once."""

import hashlib
import importlib.metadata
import io
import os
import re
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cluster import exposure
from pipeline import storage

ROOT = Path(__file__).parents[1]
PINS = "constraints.txt"  # in the zip: the versions that `cluster.driver` compares
_OURS = ("pipeline", "jobs", "cluster")
_MOST_OVER_HTTP = 95 << 20  # Ray's dashboard takes 100 MiB; by a store it may be more
_MOST = 500 << 20
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "wandb", "mlruns", "checkpoints", "venv"}
_PRIVATE = re.compile(
    r"(?i)(\.env(\..*)?|\.netrc|\.pypirc|\.npmrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|auth_token"
    r"|credentials(\.json)?|service[-_]account.*\.json|.*\.(pem|key|p12|pfx|jks|kdbx|ppk))"
)
_DATA = re.compile(
    r"(?i).*\.(tar|tgz|gz|zst|zip|whl|parquet|arrow|npy|npz|h5|pt|pth|ckpt|safetensors|onnx|jpe?g|png|webp|bmp|tiff?"
    r"|gif|mp4|so|dylib|pyc|sqlite|db|log)"
)


@dataclass(frozen=True)
class Pack:
    data: bytes
    files: int
    left_out: tuple[str, ...]  # names given by --include that stay here: secrets, data

    @property
    def name(self) -> str:
        return f"{hashlib.sha256(self.data).hexdigest()[:32]}.zip"


def pack(include: tuple[str, ...] = (), most: int = _MOST) -> Pack:
    """Millstream's own code, and beside it the files and folders of `include`, which keep their names.

    What is hidden, looks like data, or is a file for secrets is left out of folders and refused by name. Raises
    ValueError for that, for code that holds a secret, for a name that is taken, and for more than `most` bytes.
    """
    found: dict[str, Path] = {}
    for name in _OURS:
        found |= dict(_below(ROOT / name, name, []))
    left_out: list[str] = []
    for given in include:
        path = Path(given).expanduser()
        name = path.resolve().name
        if name in found or any(inside.startswith(f"{name}/") for inside in found):
            raise ValueError(f"--include {given}: {name!r} is in the package already; give it another name")
        if path.is_dir():
            found |= dict(_below(path, name, left_out))
        elif not path.exists():
            raise FileNotFoundError(f"--include {given}: no such file or folder")
        elif _PRIVATE.fullmatch(name):
            raise ValueError(f"--include {given}: a file for secrets does not travel with a job; mount it on the nodes")
        else:
            found[name] = path
    total = sum(path.stat().st_size for path in found.values())
    if total > 20 * most:
        largest = max(found, key=lambda inside: found[inside].stat().st_size)
        raise ValueError(
            f"{total >> 20} MB of code, the largest file is {largest}: put data in a store, not in the code"
        )
    contents = {name: path.read_bytes() for name, path in found.items()}
    contents[PINS] = _pins().encode()
    for name, data in contents.items():
        if name.split("/")[0] not in _OURS and (kinds := exposure.kinds(data.decode(errors="ignore"))):
            raise ValueError(
                f"{name} looks to hold a secret ({kinds[0]}): it would be shown to everybody on the cluster"
            )
    data = _zipped(contents)
    if len(data) > most:
        largest = max(contents, key=lambda name: len(contents[name]))
        hint = "give --store s3://... for up to 500 MB" if most == _MOST_OVER_HTTP else "put data in a store"
        raise ValueError(
            f"{len(data) >> 20} MB of code are more than {most >> 20} MB ({largest} is the largest): {hint}"
        )
    return Pack(data, len(contents), tuple(left_out))


def limit(store: str | None) -> int:
    """Bytes that a package may have on the way it takes."""
    return _MOST if store and storage.is_remote(store) else _MOST_OVER_HTTP


def _below(folder: Path, name: str, left_out: list[str]):
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _SKIPPED_FOLDERS)
        inside = f"{name}/{Path(where).relative_to(folder)}".removesuffix("/.")
        for file in sorted(files):
            if file.startswith(".") or _PRIVATE.fullmatch(file) or _DATA.fullmatch(file):
                left_out.append(f"{inside}/{file}")
            elif os.path.isfile(path := os.path.join(where, file)):  # no FIFO, no dangling link
                yield f"{inside}/{file}", Path(path)


def _zipped(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # no times: the bytes name the content
            info.external_attr, info.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            file.writestr(info, contents[name])
    return buffer.getvalue()


def _pins() -> str:
    """`name==version` of each package Millstream stands on: pinned in the checkout, else as installed here."""
    names = [_name(text) for text in _dependencies()]
    pinned: dict[str, str] = {}
    if (file := ROOT / PINS).exists():
        lines = (line.partition("#")[0].partition(";")[0].strip() for line in file.read_text().splitlines())
        pinned = {_name(line): line.partition("==")[2].strip() for line in lines if "==" in line}
    for name in names:
        if name not in pinned:
            try:
                pinned[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return "".join(f"{name}=={pinned[name]}\n" for name in sorted(names) if name in pinned)


def _dependencies() -> list[str]:
    if (file := ROOT / "pyproject.toml").exists():
        return tomllib.loads(file.read_text())["project"]["dependencies"]
    return [text for text in importlib.metadata.requires("millstream") or [] if "extra ==" not in text]


def _name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def unmet(pins: str) -> list[str]:
    """Packages of `pins` that this Python has in another version, or not: lines that say so."""
    found = []
    for line in pins.split():
        name, _, wanted = line.partition("==")
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} {wanted} is not installed")
            continue
        if (
            have.partition("+")[0] != wanted.partition("+")[0]
        ):  # +cpu, +cu128: the same version, built for another device
            found.append(f"{name} is {have}, not {wanted}")
    return found
