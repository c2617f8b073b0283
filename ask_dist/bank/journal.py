"""The journal of a bank: every upsert and commit since a snapshot, appended before it is acknowledged.

A file begins with the 8 bytes of `MAGIC`. Records follow one another, all numbers little-endian:

    8 bytes    length of the body
    4 bytes    CRC-32 of the body
    4 bytes    CRC-32 of the 12 bytes before
    body       1 byte: 1 upsert, 2 commit, 3 commit with prototypes; 7 bytes: number of arrays;
               8 bytes: global step of an upsert, frame of a commit;
               per array 8 bytes each: number of its dtype in `KINDS`, rows, columns (-1: one dimension);
               the arrays' values, one array after the other, row by row

Arrays of an upsert: ids, audio, text, reliability where there is one. Of a commit: ids, versions, audio, text, then
audio and text of each level of prototypes.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ask_dist.bank.messages import Commit
from ask_dist.errors import InputError
from ask_dist.files import regular_size, sync_folder

MAGIC = b"askbank1"
HEAD, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
BODY, ARRAY = struct.Struct("<B7sq"), struct.Struct("<qqq")
UPSERT, COMMIT, COMMIT_WITH_PROTOTYPES = 1, 2, 3
KINDS = (np.dtype("<i8"), np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8"))


class DamagedJournal(InputError):
    """A record that is not what was written, or is none."""


class TornJournal(DamagedJournal):
    """Half a record at the end: its writer was killed and nobody was told of that write, or the file was cut since."""


@dataclass(frozen=True)
class Upsert:
    """The arguments of `KnowledgeBank.upsert`."""

    ids: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    reliability: np.ndarray | None
    step: int


class Journal:
    """A journal being written. What `append` has returned from survives the process; what `sync` has, the machine.

    Args:
        path: of a file that does not exist yet.

    Raises:
        OSError: the file can't be made.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._open, self._closing = True, threading.Lock()
        self._written = self._synced = 0
        try:
            self._write(MAGIC)
            self.sync()
            sync_folder(path.parent)
        except OSError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    def append(self, write: Upsert | Commit) -> int:
        """Hands a record to the operating system; one caller at a time.

        Returns:
            Its bytes.

        Raises:
            OSError: the disk refused; the journal ends with half a record then, and takes no other.
        """
        parts = _body(write)
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        head = HEAD.pack(sum(part.nbytes for part in parts), checksum)
        before = self._written
        for part in (memoryview(head + CHECKSUM.pack(zlib.crc32(head))), *parts):
            self._write(part)
        return self._written - before

    def sync(self) -> None:
        """Waits until the disk has what was appended so far; others may append meanwhile.

        Raises:
            OSError: the disk could not take it.
        """
        with self._closing:
            if self._open and self._synced < self._written:
                reached = self._written
                os.fdatasync(self._file)
                self._synced = reached

    def close(self) -> None:
        with self._closing:
            if self._open:
                os.close(self._file)
            self._open = False

    def _write(self, part: bytes | memoryview) -> None:
        rest = memoryview(part)
        while rest:
            count = os.write(self._file, rest)
            self._written += count
            rest = rest[count:]


def read(path: Path, dim: int) -> Iterator[Upsert | Commit]:
    """The writes of a journal in order, as read-only views of the file.

    Args:
        path: of the file.
        dim: the bank's width.

    Raises:
        TornJournal: after the last whole record, there is half of another.
        DamagedJournal: here, a record is not what was written, or is no write to a bank of that width.
        OSError: it can't be read.
    """
    size = regular_size(path)
    if size < len(MAGIC):  # made by a process that was killed just then
        raise TornJournal(f"{path} ends after {size} bytes, before its first record")
    with open(path, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if content[: len(MAGIC)] != MAGIC:
        raise DamagedJournal(f"{path} is no journal of a bank: it begins otherwise")
    begin, frame = len(MAGIC), HEAD.size + CHECKSUM.size
    while size - begin >= frame:
        head, body = content[begin : begin + HEAD.size], begin + frame
        length, checksum = HEAD.unpack(head)
        if CHECKSUM.unpack(content[begin + HEAD.size : body])[0] != zlib.crc32(head):
            raise DamagedJournal(f"{path} is damaged at byte {begin}: the record's head does not match its checksum")
        if length > size - body:
            break
        if zlib.crc32(content[body : body + length]) != checksum:
            raise DamagedJournal(f"{path} is damaged at byte {begin}: the record does not match its checksum")
        write = _parsed(content[body : body + length], dim)
        if write is None:
            raise DamagedJournal(f"{path} has a record at byte {begin} that is no write to a bank of width {dim}")
        yield write
        begin = body + length
    if begin < size:
        raise TornJournal(f"{path} is damaged at byte {begin}: the record there has no end")


def _body(write: Upsert | Commit) -> list[memoryview]:
    if isinstance(write, Upsert):
        kind, number, arrays = UPSERT, write.step, [write.ids, write.audio, write.text]
        if write.reliability is not None:
            arrays.append(write.reliability)
    else:
        kind, number = COMMIT, write.frame
        arrays = [write.ids, write.versions, write.audio, write.text]
        if write.prototypes is not None:
            kind = COMMIT_WITH_PROTOTYPES
            arrays += [half for level in write.prototypes for half in level]
    arrays = [_plain(values) for values in arrays]
    told = BODY.pack(kind, len(arrays).to_bytes(7, "little"), number)
    for values in arrays:
        columns = values.shape[1] if values.ndim == 2 else -1
        told += ARRAY.pack(KINDS.index(values.dtype), len(values), columns)
    return [memoryview(told), *(values.reshape(-1).view(np.uint8).data for values in arrays)]


def _plain(values: np.ndarray) -> np.ndarray:
    """The same values, contiguous and of a dtype that a record can hold."""
    values = np.ascontiguousarray(values)
    return values if values.dtype in KINDS else values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


def _parsed(body: memoryview, dim: int) -> Upsert | Commit | None:
    """The write in a body whose checksum is right, None if it is none: a checksum proves no good intent."""
    if len(body) < BODY.size:
        return None
    kind, count, number = BODY.unpack(body[: BODY.size])
    arrays = _arrays(body[BODY.size :], int.from_bytes(count, "little"), dim)
    if arrays is None:
        return None
    if kind == UPSERT and len(arrays) in (3, 4):
        ids, audio, text = arrays[:3]
        reliability = arrays[3] if len(arrays) == 4 else None
        if _are_rows(ids, audio, text, dim) and (reliability is None or _fits(reliability, ids, "f")):
            return Upsert(ids, audio, text, reliability, number)
    if kind in (COMMIT, COMMIT_WITH_PROTOTYPES) and len(arrays) >= 4:
        ids, versions, audio, text, *levels = arrays
        pairs = list(zip(levels[::2], levels[1::2], strict=False))
        whole = len(levels) % 2 == 0 and (kind == COMMIT_WITH_PROTOTYPES or not levels)
        if whole and _are_rows(ids, audio, text, dim) and _fits(versions, ids, "i") and _are_levels(pairs, dim):
            return Commit(ids, audio, text, versions, number, pairs if kind == COMMIT_WITH_PROTOTYPES else None)
    return None


def _arrays(content: memoryview, count: int, dim: int) -> list[np.ndarray] | None:
    """Views of `count` arrays of one dimension or with `dim` columns, None unless they fill the content exactly."""
    begin = count * ARRAY.size
    if begin > len(content):
        return None
    arrays = []
    for code, rows, columns in ARRAY.iter_unpack(content[:begin]):
        if not 0 <= code < len(KINDS) or rows < 0 or columns not in (-1, dim):
            return None
        shape = (rows,) if columns == -1 else (rows, columns)
        end = begin + rows * abs(columns) * KINDS[code].itemsize
        if end > len(content):
            return None
        arrays.append(np.frombuffer(content[begin:end], np.uint8).view(KINDS[code]).reshape(shape))
        begin = end
    return arrays if begin == len(content) else None


def _are_rows(ids: np.ndarray, audio: np.ndarray, text: np.ndarray, dim: int) -> bool:
    wanted = (len(ids), dim)
    return ids.ndim == 1 and ids.dtype.kind == "i" and all(_is_float(part, wanted) for part in (audio, text))


def _are_levels(pairs: list[tuple[np.ndarray, np.ndarray]], dim: int) -> bool:
    return all(
        _is_float(half, (len(audio), dim)) and np.isfinite(half).all()
        for audio, text in pairs
        for half in (audio, text)
    )


def _is_float(values: np.ndarray, shape: tuple[int, ...]) -> bool:
    return values.shape == shape and values.dtype.kind == "f"


def _fits(values: np.ndarray, ids: np.ndarray, kind: str) -> bool:
    return values.shape == ids.shape and values.dtype.kind == kind
