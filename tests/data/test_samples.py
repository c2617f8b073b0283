from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ask_dist.data.audio import BadSample
from ask_dist.data.samples import Raw, open_clip, read_shard


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 3), (4, 6), (9, 1)])
def test_a_stretch_of_a_shard(corpus: Path, first: int, count: int) -> None:
    raws = list(read_shard(corpus / "train-000002.tar", first, count))
    assert [raw.key for raw in raws] == [f"clip-{20 + first + place:03d}" for place in range(count)]
    assert all(raw.problem is None and raw.shard == "train-000002.tar" for raw in raws)


def test_a_truncated_shard_still_gives_as_many_clips(corpus: Path, tmp_path: Path) -> None:
    data = (corpus / "train-000000.tar").read_bytes()
    for size in (0, 100, 512, 700, len(data) // 2, len(data) * 2 // 3):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:size])
        raws = list(read_shard(path, 0, 10))
        whole = [raw for raw in raws if raw.problem is None and {"flac", "json"} <= raw.members.keys()]
        assert len(raws) == 10
        assert len(whole) < 10
        assert [raw.key for raw in whole] == [f"clip-{place:03d}" for place in range(len(whole))]
        assert size < len(data) // 2 or len(whole) >= 4


def test_garbage_and_missing_shards_give_problems(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(20000))
    data = bytearray((corpus / "train-000000.tar").read_bytes())
    middle = len(data) // 1024 * 512
    data[middle : middle + 2048] = np.random.default_rng(0).bytes(2048)
    (tmp_path / "broken.tar").write_bytes(data)
    for name, fewest in (("noise.tar", 10), ("gone.tar", 10), ("broken.tar", 1)):
        raws = list(read_shard(tmp_path / name, 0, 10))
        unusable = 0
        for raw in raws:
            try:
                open_clip(raw, 8000)
            except BadSample:
                unusable += 1
        assert len(raws) == 10
        assert unusable >= fewest


def test_open_clip_gives_audio_and_description(corpus: Path) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 5, 1))
    audio, description = open_clip(raw, 8000)
    np.testing.assert_allclose(audio, np.random.default_rng(5).uniform(-0.5, 0.5, 400), atol=1e-4)
    assert description["captions"] == ["caption 5 a", "caption 5 b", "caption 5 c"]
    assert description["swapped"] is True
    assert len(open_clip(raw, 16000)[0]) == 800


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({}, "KeyError"),
        ([], "TypeError"),
        ({"captions": []}, "no caption"),
        ({"captions": "one"}, "no caption"),
        ({"captions": ["one", " "]}, "no caption"),
        ({"captions": [1]}, "no caption"),
    ],
)
def test_open_clip_names_bad_descriptions(corpus: Path, description: Any, reason: str) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 0, 1))
    with pytest.raises(BadSample, match=reason):
        open_clip(Raw("s", "k", {**raw.members, "json": json.dumps(description).encode()}), 8000)


def test_open_clip_names_broken_and_missing_members(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("x.flac", b"noise"), ("x.json", b'{"captions": ["one"]}'), ("y.json", b"{")])
    first, second = read_shard(path, 0, 2)
    with pytest.raises(BadSample, match="undecodable"):
        open_clip(first, 8000)
    with pytest.raises(BadSample, match="no sound: one"):
        open_clip(second, 8000)
    with pytest.raises(BadSample, match="unusable JSON: JSONDecodeError"):
        open_clip(Raw("s", "k", {"flac": b"", "json": b"{"}), 8000)


def test_pickles_in_a_shard_are_never_opened(corpus: Path, tmp_path: Path) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 0, 1))
    opened = tmp_path / "opened"
    pickle = f"cposix\nsystem\n(S'touch {opened}'\ntR.".encode()
    members = [("x.flac", raw.members["flac"]), ("x.json", raw.members["json"]), ("x.pkl", pickle), ("x.pyd", pickle)]
    open_clip(next(read_shard(tar_of(tmp_path / "a.tar", members), 0, 1)), 8000)
    assert not opened.exists()
