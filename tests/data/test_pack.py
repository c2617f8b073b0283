from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ask_dist.data.audio import BadSample
from ask_dist.data.pack import BUFFER, EncodedClip, write_shards
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.shards import Clip, ShardList
from ask_dist.errors import InputError

MakeClip = Callable[..., Clip]


def test_shards_hold_the_clips_and_sizes_describes_them(tmp_path: Path, make_clip: MakeClip) -> None:
    sizes = write_shards(map(make_clip, range(5)), tmp_path, "test", clips_per_shard=2)
    assert sizes == json.loads((tmp_path / "sizes.json").read_text())
    assert {name: shard["clips"] for name, shard in sizes["shards"].items()} == {
        "test-000000.tar": 2,
        "test-000001.tar": 2,
        "test-000002.tar": 1,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sizes.json", *sizes["shards"]]
    data = (tmp_path / "test-000001.tar").read_bytes()
    assert sizes["shards"]["test-000001.tar"]["sha256"] == hashlib.sha256(data).hexdigest()
    with tarfile.open(tmp_path / "test-000001.tar") as tar:
        assert tar.getnames() == ["clip-002.flac", "clip-002.json", "clip-003.flac", "clip-003.json"]
    audio, description = open_clip(next(read_shard(tmp_path / "test-000001.tar", 0, 1)), 8000)
    np.testing.assert_allclose(audio, make_clip(2).audio, atol=1e-4)
    assert description == {
        "captions": ["caption 2 a", "caption 2 b", "caption 2 c"],
        "classes": ["class 2"],
        "swapped": False,
    }


def test_the_same_clips_give_the_same_bytes(tmp_path: Path, make_clip: MakeClip) -> None:
    for name in "ab":
        write_shards(map(make_clip, range(3)), tmp_path / name, "train")
    assert (tmp_path / "a/sizes.json").read_bytes() == (tmp_path / "b/sizes.json").read_bytes()
    assert (tmp_path / "a/train-000000.tar").read_bytes() == (tmp_path / "b/train-000000.tar").read_bytes()


def test_too_loud_audio_is_clipped_not_wrapped(tmp_path: Path) -> None:
    loud = np.array([0.5, 1.5, -1.5, 0.25] * 20, np.float32)
    write_shards([Clip("loud", loud, 8000, ("loud",))], tmp_path, "train")
    audio, _ = open_clip(next(read_shard(tmp_path / "train-000000.tar", 0, 1)), 8000)
    np.testing.assert_allclose(audio, np.clip(loud, -1, 1), atol=1e-4)


def test_an_interrupted_pack_leaves_the_former_one(tmp_path: Path, make_clip: MakeClip) -> None:
    def stopped() -> Iterator[Clip]:
        yield from map(make_clip, range(3))
        raise KeyboardInterrupt

    write_shards(map(make_clip, range(10)), tmp_path, "train", clips_per_shard=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_shards(stopped(), tmp_path, "train", clips_per_shard=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_shards(map(make_clip, range(3)), tmp_path, "train", clips_per_shard=2)
    assert ShardList.load(tmp_path).counts == (2, 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_stored_is_refused(tmp_path: Path, make_clip: MakeClip) -> None:
    clip = make_clip(0)
    for bad, message in (
        ([replace(clip, key="a/b")], "key 'a/b'"),
        ([replace(clip, key="k" * 81)], "use 1 to 80"),
        ([replace(clip, captions=())], "give at least one"),
        ([replace(clip, captions=("one", " "))], "none empty"),
        ([replace(clip, captions=("one", "x" * 10_001))], "a caption of 10001 characters: give at most 10000"),
        ([clip, clip], "occurs twice"),
        ([clip, replace(make_clip(1), sample_rate=16000)], r"sample rates \[8000, 16000\]"),
        ([], "no clips"),
    ):
        with pytest.raises(InputError, match=message):
            write_shards(bad, tmp_path, "train")
    with pytest.raises(BadSample, match="silent"):
        write_shards([replace(clip, audio=clip.audio * 0)], tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("extension", "limit"), [("json", 2**20), ("wav", 2**28)])
def test_no_clip_is_larger_than_readers_take(extension: str, limit: int) -> None:
    def clip(size: int) -> EncodedClip:
        members = {"wav": b"", "json": b""} | {extension: bytes(size)}
        return EncodedClip("a", members["wav"], "wav", members["json"], 8000, 1.0, ())

    assert clip(limit).key == "a"
    with pytest.raises(BadSample, match=rf"its \.{extension} has {limit + 1} bytes, over the limit of"):
        clip(limit + 1)


def test_a_shard_is_digested_as_it_lies_on_the_disk(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 400_000).astype(np.float32)
    clips = [Clip(f"clip-{number}", noise, 8000, ("noise",), ()) for number in range(5)]  # more than a buffer each
    sizes = write_shards(clips, tmp_path, "train")
    digest = hashlib.sha256((tmp_path / "train-000000.tar").read_bytes()).hexdigest()
    assert sizes["shards"]["train-000000.tar"]["sha256"] == digest
    assert (tmp_path / "train-000000.tar").stat().st_size > 3 * BUFFER
