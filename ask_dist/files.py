"""Files that a reader sees either as they were or as they are now, never in between; disks that refuse them; and what
is no file."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ask_dist.errors import DiskError

# What the operating system says of a disk that is full, read-only or forbidden, and hardly of anything else.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def write_atomically(path: Path, content: bytes) -> None:
    """Writes aside, flushes to disk, renames.

    Raises:
        OSError: the folder is missing, full or not writable; an older file is then untouched.
    """
    aside = aside_of(path)
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def aside_of(path: Path) -> Path:
    """A hidden name beside `path` that no other thread, process or machine writes to: a process id is not enough."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def regular_size(path: Path) -> int:
    """The bytes of a regular file. To open anything else, a pipe say, may wait for ever: ask before.

    Raises:
        OSError: it is missing, or no regular file.
    """
    told = path.stat()
    if not stat.S_ISREG(told.st_mode):
        raise OSError("it is no regular file")
    return told.st_size


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk: new, renamed and removed names in it last only then."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a block in which the operating system refuses nothing but writing to `path`, a file or a folder.

    Raises:
        DiskError: the disk refused; says why, how much of it is free, and what to do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error_number(error)
        if code is None:
            raise
        raise refusal(path, code) from error


def error_number(error: BaseException) -> int | None:
    """The operating system's errno in an exception, where there is one."""
    if isinstance(error, SafetensorError):  # has it in its text alone
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    return error.errno if isinstance(error, OSError) else None


def refusal(path: Path, code: int) -> DiskError:
    """The line for a disk that refused to write `path` with the errno `code`."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    disk = shutil.disk_usage(place)
    return DiskError(
        f"{path} can't be written: {os.strerror(code)} ({disk.free / 2**20:.1f} of {disk.total / 2**20:.0f} MiB free); "
        "free space or make it writable, then run the command again (train and tune: with --resume), or elsewhere "
        "(output_dir=)"
    )
