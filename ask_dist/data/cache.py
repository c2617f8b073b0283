"""Files from URLs, kept in a local folder up to a size; several processes may share it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fsspec.callbacks import Callback

from ask_dist.config import Config
from ask_dist.data.audio import BadSample
from ask_dist.data.places import READ_SECONDS, Pace, filesystem, may_pass, one_line
from ask_dist.errors import InputError
from ask_dist.files import aside_of, refusal, writing

DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ask-dist" / "shards"
DEFAULT_GIB = 20.0
LARGEST_SIZES = 1 << 28  # bytes of a sizes.json
FORGOTTEN = 3600.0  # seconds after which an unfinished download is nobody's any more
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
log = logging.getLogger(__name__)


class _TooLarge(Exception):
    """A download that goes on beyond what it may weigh."""


class _Meter(Callback):
    """Stops a download at `limit` bytes, or where it is too slow, whatever the server sends."""

    def __init__(self, limit: int, grace: float) -> None:
        super().__init__()
        self._limit = limit
        self._pace = Pace(grace)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._limit:
            raise _TooLarge(f"over {self._limit} bytes")
        self._pace.check(self.value)


@dataclass
class ShardCache:
    """Shards from URLs, each fetched when it is needed, checked, and kept until the room is needed for another.

    The one that was used longest ago goes first, but none that a process has open; so the folder can exceed `gib` by
    the shards that are being read. On a file system without locks nobody knows what is open, and none goes.

    Attributes:
        folder: private to caches of this kind.
        gib: its size limit.
        tries: how often a shard is asked for before it counts as lost.
        pause: seconds before the second try; each further pause is twice as long.
        read_seconds: silence of a server after which a try has failed; after so many it must also be at its pace.
    """

    folder: Path = DEFAULT_FOLDER
    gib: float = DEFAULT_GIB
    tries: int = 4
    pause: float = 1.0
    read_seconds: float = READ_SECONDS
    _verified: set[str] = field(default_factory=set, repr=False)
    _locks: bool = field(default=True, repr=False)

    def place(self, url: str, sha256: str) -> Path:
        """Where a shard with this content lies, or would."""
        return self.folder / f"{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:40]}.tar"

    @contextmanager
    def opened(self, url: str, sha256: str) -> Iterator[Path]:
        """The shard as a local file, which stays while the context lasts.

        Raises:
            BadSample: it can't be had, or is not what `sha256` says.
            DiskError: the cache's disk is full or can't be written.
        """
        path = self.place(url, sha256)
        descriptor = self._hold(path)
        try:
            if descriptor is not None and not self._is(path, sha256):
                os.close(descriptor)
                descriptor = None
            while descriptor is None:
                self.fetch(url, path, int(self.gib * 2**30), sha256)
                self._verified.add(path.name)
                descriptor = self._hold(path)  # None where another process evicted it in between
            os.utime(descriptor)
            self._evict()
            yield path
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _hold(self, path: Path) -> int | None:
        """Opens the file with a lock that keeps it from being evicted; None if there is no such file."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            self._go_on_without_locks(error)
        if os.fstat(descriptor).st_nlink == 0:  # evicted before it was locked
            os.close(descriptor)
            return None
        return descriptor

    def _go_on_without_locks(self, error: OSError) -> None:
        if self._locks:
            self._locks = False
            log.warning(
                "%s can't be locked (%s): no shard is removed from it, so watch its size, or set data.cache_dir to a "
                "local disk",
                self.folder,
                error.strerror,
            )

    def _is(self, path: Path, sha256: str) -> bool:
        """Whether a file from an earlier process, or another, is whole; asked once each."""
        if path.name not in self._verified and file_sha256(path) == sha256:
            self._verified.add(path.name)
        return path.name in self._verified

    def fetch(self, url: str, path: Path, limit: int, sha256: str | None = None) -> None:
        """Downloads a file, which appears whole or not at all; tries again after what may pass.

        Args:
            url: where from.
            path: where to.
            limit: bytes that it may have.
            sha256: of the content, or None where that is not known.

        Raises:
            BadSample: all tries failed, or it can't get better; says why.
            InputError: the scheme is not read here, or its library is not installed.
            DiskError: the disk is full or can't be written.
        """
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        aside = aside_of(path)
        pause, attempt, problem = self.pause, 0, ""
        while attempt < self.tries:
            if attempt:
                time.sleep(pause)
                pause *= 2
            attempt += 1
            try:
                files, place = filesystem(url, self.read_seconds)
                files.get_file(place, str(aside), callback=_Meter(limit, self.read_seconds))
                if sha256 is None or file_sha256(aside) == sha256:
                    os.replace(aside, path)
                    return
                problem = f"{aside.stat().st_size} bytes came, whose SHA-256 is not that of sizes.json"
            except InputError:
                raise
            except Exception as error:  # each library has errors of its own, and not all are OSErrors
                if isinstance(error, OSError) and error.errno in FULL:
                    raise refusal(path, error.errno) from None
                problem = one_line(error)
                if isinstance(error, _TooLarge) or not may_pass(error):
                    break
            finally:
                aside.unlink(missing_ok=True)
            log.warning("%s, try %d of %d: %s", url, attempt, self.tries, problem)
        raise BadSample(f"{url} can't be had after {attempt} {'try' if attempt == 1 else 'tries'}: {problem}")

    def _evict(self) -> None:
        """Removes what was used longest ago until the folder is within its limit."""
        entries = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                facts = entry.stat()
                if entry.name.endswith(".partial") and time.time() - facts.st_mtime > FORGOTTEN:
                    os.unlink(entry.path)
                elif entry.name.endswith(".tar"):
                    entries.append((facts.st_mtime, facts.st_size, entry.path))
        excess = sum(size for _, size, _ in entries) - self.gib * 2**30
        for _, size, path in sorted(entries):
            if excess <= 0 or not self._locks:
                return
            excess -= size if self._unlink_unless_held(path) else 0

    def _unlink_unless_held(self, path: str) -> bool:
        """Whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDWR)  # NFS locks for writing only what is open for it
        except FileNotFoundError:  # another process was quicker
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            self._go_on_without_locks(error)
            return False
        else:
            with suppress(FileNotFoundError):
                os.unlink(path)
            return True
        finally:
            os.close(descriptor)


def cache_of(config: Config) -> ShardCache:
    """The cache that a run's configuration names."""
    folder = DEFAULT_FOLDER if config.data.cache_dir is None else config.data.cache_dir
    return ShardCache(folder, config.data.cache_gib)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
