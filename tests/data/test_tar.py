from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_dist.data.tar import BLOCK, CHECKSUM, EXTENDED, MAGIC, Member, all_members, members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    rng = np.random.default_rng(0)
    contents = {f"folder/file-{size}.bin": rng.bytes(size) for size in (0, 1, 511, 512, 513, 5000)}
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # a fraction needs an extended header
            tar.addfile(info, io.BytesIO(content))
    with (tmp_path / "a.tar").open("rb") as stream:
        met = {}
        for member in members(stream):
            stream.seek(member.offset)
            met[member.name] = stream.read(member.size)
    assert met == contents


def test_what_is_no_header_is_passed_over() -> None:
    info = tarfile.TarInfo("x.json")
    info.size = 3
    whole = info.tobuf() + b"{ }".ljust(BLOCK, b"\0")
    damaged = bytearray(whole)
    damaged[0] ^= 1
    stream = io.BytesIO(bytes(BLOCK) + damaged + np.random.default_rng(0).bytes(BLOCK) + whole + whole[:100])
    assert list(members(stream)) == [Member("x.json", 5 * BLOCK, 3)]


# Of mode, owner, group, time and device tarfile wants numbers, and we want nothing.
READ = [place for place in range(BLOCK) if not (100 <= place < 124 or 136 <= place < 148 or 329 <= place < 345)]


def as_tarfile(header: bytes) -> list[Member]:
    """The slow reference."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return []
    if info.size < 0 or info.type in EXTENDED:
        return []
    link = info.linkname if info.issym() or info.islnk() else ""
    return [Member(info.name.removeprefix("./"), BLOCK, info.size, info.type, link)]


def checked(header: bytearray) -> bytes:
    """With the checksum that it should have."""
    header[CHECKSUM] = b" " * 8
    header[CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


@given(place=st.sampled_from(READ), value=st.integers(0, 255), mended=st.booleans(), data=st.data())
@settings(max_examples=500)
def test_every_header_is_read_as_tarfile_reads_it(place: int, value: int, mended: bool, data: st.DataObject) -> None:
    info = tarfile.TarInfo(
        data.draw(st.sampled_from(["a.json", "./a.flac", "d/a.flac", "\u00e9.json", "x" * 99, "d" * 90 + "/x" * 9]))
    )
    info.size = data.draw(st.sampled_from([0, 1, 511, 8**11 - 1]))
    info.type = data.draw(st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE]))
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[place] = value
    block = checked(header) if mended else bytes(header)
    whole = block[MAGIC] == b"ustar"
    assert list(all_members(io.BytesIO(block))) == (as_tarfile(block) if whole else [])
