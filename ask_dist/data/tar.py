"""Walking through a tar that may be damaged or hostile: bounded memory, no recursion, always towards its end."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAGIC = slice(257, 262)
EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


class Member(NamedTuple):
    """A plain file of a tar: its name, where its data begin, and how many bytes its header claims."""

    name: str
    offset: int
    size: int


def members(stream: BinaryIO) -> Iterator[Member]:
    """The plain files of an uncompressed tar, by their headers alone; the caller may move the stream meanwhile.

    Links, devices, folders and sparse files are passed over.
    """
    for info in headers(stream):
        if info.type in PLAIN:
            yield Member(info.name, info.offset_data, info.size)


def headers(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of an uncompressed tar, whatever they are of, each with `offset_data`.

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
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        if info.size < 0:  # base-256 numbers can be; never walk backwards
            continue
        if info.type not in EXTENDED:
            info.name, info.offset_data = info.name.removeprefix(f".{os.sep}"), offset
            yield info
        offset += -(-info.size // BLOCK) * BLOCK
