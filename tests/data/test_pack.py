from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.data.audio import BadSample
from ask_dist.data.pack import make_keys, pack_table, write_shards
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
        ([clip, clip], "occurs twice"),
        ([clip, replace(make_clip(1), sample_rate=16000)], r"sample rates \[8000, 16000\]"),
        ([], "no clips"),
    ):
        with pytest.raises(InputError, match=message):
            write_shards(bad, tmp_path, "train")
    with pytest.raises(BadSample, match="silent"):
        write_shards([replace(clip, audio=clip.audio * 0)], tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder of audio files: two good ones, of which one is stereo at 44.1 kHz, and four bad ones."""
    folder = tmp_path / "sounds"
    (folder / "dogs").mkdir(parents=True)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (44100, 2))
    soundfile.write(folder / "dogs" / "Bark 1.wav", noise, 44100)
    soundfile.write(folder / "cat.flac", noise[:800, 0], 8000)
    soundfile.write(folder / "silent.wav", noise[:800, 0] * 0, 8000)
    soundfile.write(folder / "empty.wav", noise[:0, 0], 8000)
    soundfile.write(folder / "wordless.wav", noise[:800, 0], 8000)
    (folder / "noise.wav").write_bytes(b"noise")
    return folder


def test_a_table_is_packed_and_bad_rows_are_named(tmp_path: Path, sounds: Path) -> None:
    lines = ["audio,caption,class", "dogs/Bark 1.wav,a dog barks,dog", "cat.flac,a cat,cat", "cat.flac,it meows,"]
    lines += [f"{name},words," for name in ("silent.wav", "empty.wav", "noise.wav", "gone.wav", "")] + [
        "wordless.wav, ,"
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    calls: list[tuple[int, int]] = []
    out = tmp_path / "out"
    summary = pack_table(tmp_path / "t.csv", sounds, out, "train", progress=lambda *call: calls.append(call))
    assert (summary.clips, summary.shards, summary.classes) == (2, 1, {"cat": 1, "dog": 1})
    assert summary.seconds == pytest.approx(1.1)
    reasons = {record["audio"]: record["reason"].split(":")[0] for record in summary.skipped}
    assert reasons == {
        "silent.wav": "silent audio",
        "empty.wav": "empty audio",
        "noise.wav": "undecodable audio",
        "gone.wav": "unreadable file",
        "wordless.wav": "no caption",
        "": "no path",
    }
    assert [record["line"] for record in summary.skipped] == [5, 6, 7, 8, 9, 10]
    assert list(map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())) == summary.skipped
    assert calls == [(done, 8) for done in range(1, 9)]
    bark, cat = read_shard(out / "train-000000.tar", 0, 2)
    assert (bark.key, cat.key) == ("dogs_Bark_1", "cat")
    assert len(open_clip(bark, 16000)[0]) == 16000
    assert open_clip(cat, 16000)[1]["captions"] == ["a cat", "it meows"]
    (tmp_path / "t.csv").write_text("\n".join(lines[:3]))
    assert pack_table(tmp_path / "t.csv", sounds, out, "train").skipped == []
    assert not (out / "quarantine.jsonl").exists()


@pytest.mark.parametrize("path", ["../secret.wav", "dogs/../../secret.wav", "{outside}", "link.wav", "a\\u0000b"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path, sounds: Path, path: str) -> None:
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, np.random.default_rng(0).uniform(-1, 1, 800), 8000)
    (sounds / "link.wav").symlink_to(secret)
    path = path.replace("{outside}", str(secret))
    good = '{"audio": "cat.flac", "caption": "a cat"}\n'
    (tmp_path / "t.jsonl").write_text(good + f'{{"audio": "{path}", "caption": "words"}}\n')
    with pytest.raises(InputError, match=r"line 2: .* leads out of"):
        pack_table(tmp_path / "t.jsonl", sounds, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


def test_unusable_input_is_an_input_error(tmp_path: Path, sounds: Path) -> None:
    (tmp_path / "t.csv").write_text("audio,caption\nsilent.wav,x\nempty.wav,y\n")
    with pytest.raises(InputError, match=r"all 2 audio files of .* are bad, the first: silent audio"):
        pack_table(tmp_path / "t.csv", sounds, tmp_path / "out", "train")
    with pytest.raises(InputError, match="no audio folder"):
        pack_table(tmp_path / "t.csv", tmp_path / "nowhere", tmp_path / "out", "train")
    with pytest.raises(InputError, match=r"split '\.\./x'"):
        pack_table(tmp_path / "t.csv", sounds, tmp_path / "out", "../x")


def test_keys_are_valid_unique_and_do_not_depend_on_the_order() -> None:
    names = [
        "a/b.wav",
        "a_b.wav",
        "a/b.flac",
        "ünï.wav",
        "é.wav",
        "plain-1.wav",
        "x" * 200 + ".wav",
        "x" * 200 + "y.wav",
    ]
    keys = make_keys(names)
    assert keys[5] == "plain-1"
    assert len(set(keys)) == len(keys)
    assert all(1 <= len(key) <= 80 and key.replace("-", "").replace("_", "").isascii() for key in keys)
    assert dict(zip(names, keys, strict=True)) == dict(zip(names[::-1], make_keys(names[::-1]), strict=True))
