"""Where shards may lie: local folders, folders behind URLs, patterns of either."""

from __future__ import annotations

import glob
import inspect
import time
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand

from ask_dist.errors import InputError

# What each needs beside fsspec. Others, and fsspec's chains of them, are refused: some run commands or read pickles.
NEEDS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "memory": "", "file": ""}
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
# Bytes a second that a download has on average, or has failed: no read times out at a server that drips. A GiB may take
# three days.
SLOWEST = 4096


class TooSlow(Exception):
    """A download that goes on but leads nowhere."""


class Pace:
    """Watches how fast one download comes from its first bytes on, but for `grace` seconds."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._began: float | None = None  # until then the limits on silence hold

    def check(self, received: int) -> None:
        """Called whenever some more came. Raises TooSlow where `received` bytes are too few by now."""
        if self._began is None:
            self._began = time.monotonic()
        seconds = time.monotonic() - self._began
        if received < SLOWEST * (seconds - self._grace):
            raise TooSlow(f"{received} bytes in {seconds:.1f} s, less than {SLOWEST} a second")


def is_url(place: str | Path) -> bool:
    """Whether a place is behind a URL; anything else is a local path."""
    return "://" in str(place)


def filesystem(url: str, read_seconds: float = READ_SECONDS) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Secrets come from the environment, as each library reads it.

    Raises:
        InputError: the scheme is none of http, https, s3, gs, memory and file, or its library is not installed.
    """
    scheme = url.split("://", 1)[0]
    if scheme not in NEEDS:
        raise InputError(f"{url}: scheme {scheme!r} is not among {', '.join(NEEDS)}; use one of them or a local folder")
    try:
        return reach(url, CONNECT_SECONDS, read_seconds)
    except ImportError:
        raise InputError(f"{url} needs {NEEDS[scheme]}: pip install {NEEDS[scheme]}, or copy the shards here") from None


def reach(url: str, connect_seconds: float, read_seconds: float) -> tuple[Any, str]:
    """As `filesystem`, of any scheme; gives up on a server that is silent for so long. Raises ImportError."""
    options: dict[str, Any] = {}
    scheme = url.split("://", 1)[0]
    if scheme in ("http", "https", "gs", "gcs"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=read_seconds)
        if scheme in ("gs", "gcs"):
            # Not the class that gcsfs names: it asks by gRPC first, for up to a minute, what kind of bucket it is.
            from gcsfs.core import GCSFileSystem

            bucket = _asked_once(GCSFileSystem)(requests_timeout=limits, session_kwargs={"trust_env": True})
            return bucket, bucket._strip_protocol(url)
        options = {"client_kwargs": {"timeout": limits, "trust_env": True}}
    elif scheme == "s3":
        seconds = {"connect_timeout": connect_seconds, "read_timeout": read_seconds}
        options = {"config_kwargs": seconds | {"retries": {"max_attempts": 0}}}
    files, path = fsspec.core.url_to_fs(url, **options)
    if scheme == "s3":
        files.retries = 1  # who asks tries again: s3fs' five tries, and botocore's, would multiply with theirs
    return files, path


@cache
def _asked_once(kind: Any) -> Any:
    """gcsfs' file system without its six tries, which are in its methods: who asks tries again, they would multiply."""
    tries = {
        name: method.__wrapped__
        for name, method in vars(kind).items()
        if inspect.iscoroutinefunction(method) and hasattr(method, "__wrapped__")
    }
    return type(kind.__name__, (kind,), tries)


def status_of(error: Exception) -> int | None:
    """The HTTP status that a library's error carries, or None."""
    if type(error) is OSError and str(error).startswith("Forbidden: "):  # all that gcsfs says of a 403
        return 403
    status = getattr(error, "status" if hasattr(error, "status") else "code", None)
    return status if isinstance(status, int) else None


def may_pass(error: Exception) -> bool:
    """Whether another try can help: not against what is missing or forbidden."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    status = status_of(error)
    return status is None or status >= 500 or status in (408, 429)


def expand(place: str | Path) -> list[tuple[str, tuple[str, ...]]]:
    """The folders that a place names: `{a,b}` and `{0..9}` are written out, `*` and `[...]` looked up, sorted.

    Returns:
        Each folder, and where the place names tar files in it and not the whole folder, their names or patterns.

    Raises:
        InputError: braces that don't close, a pattern that nothing matches, or a URL that can't be listed.
    """
    if not is_url(place) and Path(place).is_dir():  # braces and brackets in the name of a folder are its own
        return [(str(place), ())]
    try:
        written = list(braceexpand(str(place)))
    except ValueError as error:
        raise InputError(f"{place}: {error}; write braces as {{a,b}} or {{000..123}}") from None
    folders: dict[str, list[str]] = {}
    for text in written:
        folder, _, name = text.rpartition("/") if text.endswith(".tar") else (text.rstrip("/") or "/", "", "")
        for found in _matches(folder or "."):
            folders.setdefault(found, []).append(name)
    return [(folder, () if "" in names else tuple(names)) for folder, names in folders.items()]


def _matches(folder: str) -> list[str]:
    """The folder, or those that match it where it is a pattern."""
    if not set("*[") & set(folder):
        return [folder]
    if not is_url(folder):
        found = sorted(path for path in glob.glob(folder) if Path(path).is_dir())
    else:
        files, path = filesystem(folder)
        try:
            found = sorted(files.unstrip_protocol(name.rstrip("/")) for name in files.glob(path))
        except Exception as error:  # each library has errors of its own, and not all are OSErrors
            raise InputError(f"{folder} can't be listed ({one_line(error)}): name the folders one by one") from None
    if not found:
        raise InputError(f"nothing matches {folder}: correct the pattern")
    return found


def one_line(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing, or no more than a name."""
    said = " ".join(str(error).split()) or type(error).__name__
    return f"not found: {said}" if isinstance(error, FileNotFoundError) and " " not in said else said
