"""Files that a reader sees either as they were or as they are now, never in between."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes aside, flushes to disk, renames.

    Raises:
        OSError: the folder is missing, full or not writable; an older file is then untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lasts only once the folder is on disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
