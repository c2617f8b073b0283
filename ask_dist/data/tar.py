"""Walking through a tar that may be damaged or hostile: bounded memory, no recursion, always towards its end."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
# Fields of a header (POSIX ustar).
NAME, SIZE, CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
TYPE, MAGIC, PREFIX_STARTS = slice(156, 157), slice(257, 262), 345
EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


class Member(NamedTuple):
    """A member of a tar: its name, where its data begin, how many bytes its header claims, the header's type, and what
    a link leads to."""

    name: str
    offset: int
    size: int
    type: bytes = tarfile.REGTYPE
    link: str = ""


def members(stream: BinaryIO) -> Iterator[Member]:
    """The plain files of an uncompressed tar, by their headers alone; the caller may move the stream meanwhile.

    Links, devices, folders and sparse files are passed over.
    """
    return (member for member in all_members(stream) if member.type in PLAIN)


def all_members(stream: BinaryIO) -> Iterator[Member]:
    """The members of an uncompressed tar, whatever they are.

    Extended headers are passed over: a name that needs one is longer than a key may be. What is no header (the zeros at
    the end, or damage) is passed over block by block, so that a damaged header costs its own member and not the rest of
    the shard.
    """
    length = stream.seek(0, io.SEEK_END)
    offset = 0
    while offset + BLOCK <= length:
        stream.seek(offset)
        header = stream.read(BLOCK)
        offset += BLOCK
        if header[MAGIC] != b"ustar":
            continue
        try:
            member = _usual(header, offset) or _unusual(header, offset)
        except tarfile.HeaderError:
            continue
        if member.size < 0:  # base-256 numbers can be; never walk backwards
            continue
        if member.type not in EXTENDED:
            yield member
        offset += -(-member.size // BLOCK) * BLOCK


def _usual(header: bytes, offset: int) -> Member | None:
    """What nearly every header of a shard is, a plain file without a folder's prefix; None for any other.

    tarfile reads all 16 fields, which makes it slower than the rest of reading a clip. What nobody asks for (mode,
    owner, time) is not looked at here.
    """
    if header[TYPE] != tarfile.REGTYPE or header[PREFIX_STARTS]:
        return None
    try:
        size, checksum = (int(header[field].rstrip(b"\0 "), 8) for field in (SIZE, CHECKSUM))
        name = header[NAME].partition(b"\0")[0].decode()
    except ValueError:
        return None
    if checksum != sum(header) - sum(header[CHECKSUM]) + 8 * ord(" "):
        return None
    return Member(_plain(name), offset, size)


def _unusual(header: bytes, offset: int) -> Member:
    """Any header that tarfile reads; raises tarfile.HeaderError where it is none."""
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    link = info.linkname if info.issym() or info.islnk() else ""
    return Member(_plain(info.name), offset, info.size, info.type, link)


def _plain(name: str) -> str:
    return name.removeprefix(f".{os.sep}")
