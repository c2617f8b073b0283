from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ask_dist.data.tar import BLOCK, Member, members


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
