"""Tokens of Ray clusters: found where Ray looks for them, and sent only where nobody can listen."""

import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def token() -> str | None:
    """The token of the cluster: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token, in Ray's order.

    None where there is none, or RAY_AUTH_MODE=disabled. ValueError if RAY_AUTH_TOKEN_PATH cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(path).read_text().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"RAY_AUTH_TOKEN_PATH={path!r} cannot be read: {error}") from None
    try:
        return _home_file().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def use_token() -> None:
    """Has Ray use the token there is: it must hear of it before `import ray`, and by itself would send none."""
    if "RAY_AUTH_MODE" not in os.environ and token():
        os.environ["RAY_AUTH_MODE"] = "token"


def readable_by_others() -> Path | None:
    """The token's file if others on this machine can read it, as Ray itself writes it."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or _home_file())
    try:
        return path if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH) else None
    except OSError:
        return None


def listeners(address: str, insecure: bool) -> None:
    """ValueError if what is said to `address` could be heard on its way, unless `insecure`."""
    parts = urlsplit(address)
    if parts.scheme == "https" or parts.hostname in _LOOPBACK or insecure:
        return
    raise ValueError(
        f"{address}: whoever can reach a Ray head runs code on it, and plain http shows all the token. Go through "
        f"a tunnel (ssh -L 8265:127.0.0.1:8265 ..., kubectl port-forward svc/... 8265) or https://, or say --insecure"
    )


def _home_file() -> Path:
    return Path("~/.ray/auth_token").expanduser()
