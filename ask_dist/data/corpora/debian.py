"""Debian packages as a source of recordings: fetched and unpacked without root, read without running anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ask_dist.errors import InputError

# Of a single recording; the longest in the catalogue is far below.
LARGEST_RECORDING_BYTES = 64 * 2**20
# How old the archive's lists may be when something is downloaded; old ones name versions that are gone.
LISTS_LAST_SECONDS = 3600


@dataclass(frozen=True)
class Package:
    """A package that lies unpacked in the cache.

    Attributes:
        name: Debian's name of it.
        version: Debian's version of what was unpacked.
        root: the folder it was unpacked to.
        size: of the .deb, in bytes.
    """

    name: str
    version: str
    root: Path
    size: int


def fetch(name: str, cache: Path) -> Package:
    """Download a package with `apt-get` and unpack it, both into `cache`; what lies there is used again.

    apt checks the download against the archive's signed lists, which go to the cache too: nothing needs root.

    Raises:
        InputError: no apt-get or dpkg-deb here, no such package, no connection, or a damaged .deb.
    """
    require_tools()
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    deb = _newest(debs, name) or _download(name, cache, debs)
    version = _run(["dpkg-deb", "--field", str(deb), "Version"], _damaged(deb)).strip()
    root = cache / "unpacked" / deb.stem
    if not root.is_dir():
        _unpack(deb, root)
    return Package(name, version, root, deb.stat().st_size)


def require_tools() -> None:
    """Raise InputError where this machine lacks the two programs that fetching needs."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise InputError(
            f"no {' and no '.join(missing)} here: the open sounds come out of Debian packages; build them on Debian 12 "
            "and copy the folder, or use another corpus"
        )


def read_member(root: Path, path: str) -> bytes:
    """The bytes of a file of an unpacked package; of a zip's member where the path is `archive!member`.

    Raises:
        InputError: not there, a link that leads out of the package, or larger than 64 MiB.
    """
    file_name, _, member = path.partition("!")
    file = (root / file_name).resolve()
    if not file.is_relative_to(root.resolve()) or not file.is_file():
        raise InputError(f"no {path} in {root}: the catalogue was made for the packages of Debian 12; build it there")
    try:
        if not member:
            _limit_size(path, file.stat().st_size)
            return file.read_bytes()
        with zipfile.ZipFile(file) as archive:
            _limit_size(path, archive.getinfo(member).file_size)
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"can't read {path} in {root} ({error}): delete that folder and build again") from None


def _limit_size(path: str, size: int) -> None:
    if size > LARGEST_RECORDING_BYTES:
        raise InputError(
            f"{path} has {size} bytes, more than {LARGEST_RECORDING_BYTES}: not a recording of the catalogue"
        )


def _newest(debs: Path, name: str) -> Path | None:
    """The package's .deb that was written last, if there is one."""
    return max(debs.glob(f"{name}_*.deb"), key=lambda deb: (deb.stat().st_mtime, deb.name), default=None)


def _download(name: str, cache: Path, debs: Path) -> Path:
    """Let apt download into a folder of its own, then move the checked .deb to where fetch looks."""
    remedy = f"check the package's name and the network, or lay its .deb into {debs}"
    options = _private_apt(cache)
    lists_read = cache / "apt" / "lists-read"
    if not lists_read.exists() or time.time() - lists_read.stat().st_mtime > LISTS_LAST_SECONDS:
        _run(["apt-get", *options, "--quiet", "update"], f"`apt-get update` failed: {remedy}")
        lists_read.touch()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _run(["apt-get", *options, "--quiet", "download", name], f"can't download {name}: {remedy}", folder)
        deb = _newest(Path(folder), name)
        if deb is None:
            raise InputError(f"apt-get downloaded no {name}: {remedy}")
        return deb.replace(debs / deb.name)


def _private_apt(cache: Path) -> list[str]:
    """Options that make apt keep its lists and its cache in ours, so that it writes to nothing of the system's."""
    apt = (cache / "apt").resolve()
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        # As root apt would hand the download to a user who may not write to our folder.
        "APT::Sandbox::User": "root",
        # `update` exits with 0 on a mirror that can't be reached, unless told otherwise.
        "APT::Update::Error-Mode": "any",
    }
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def _unpack(deb: Path, root: Path) -> None:
    """Unpack beside `root` and rename, so that a folder with the package's name is always whole."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        unpacked = Path(folder) / "content"
        _run(["dpkg-deb", "--extract", str(deb), str(unpacked)], _damaged(deb))
        os.replace(unpacked, root)


def _damaged(deb: Path) -> str:
    return f"{deb} is damaged: delete it and build again"


def _run(command: list[str], problem: str, folder: str | None = None) -> str:
    """The command's standard output; an InputError with `problem` and the last line of its complaint if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or ["no message"]
        raise InputError(f"{problem} ({complaint[-1].strip()})")
    return done.stdout
