"""Where things lie in a registry, and when and by whom they are written."""

import getpass
import os
import re
import socket
from datetime import UTC, datetime

from pipeline import storage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def place(root: str, name: str, rest: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a model: letters, digits, dots, dashes and underscores")
    return storage.join(root, name, rest)


def listing(folder: str) -> list[str]:
    """The files below a folder, none where there is none. FileNotFoundError if there is no such bucket."""
    try:
        return [file.path for file in storage.list_files(folder)]
    except FileNotFoundError:
        if storage.is_remote(folder):
            raise
        return []


def who() -> str:
    """Who runs this, for the history."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a user without a name, as in a container
        return f"{os.getuid()}@{socket.gethostname()}"


def timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
