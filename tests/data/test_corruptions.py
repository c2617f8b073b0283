"""Thousands of damaged shards: each is either as good as before, or named; none hangs, crashes or misaligns a run."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.data.audio import LOUDEST
from ask_dist.data.lanes import Cut, LaneReader, Part
from ask_dist.data.order import Order
from ask_dist.data.pack import EncodedClip, describe, encode_clip, write_shards
from ask_dist.data.shards import Clip, ShardList
from ask_dist.data.tar import BLOCK

Change = Callable[[bytearray, np.random.Generator], bytes]


def flip_bits(data: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def cut(data: bytearray, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(len(data), size=2))
    return bytes(data[:first] + data[last:]) if rng.integers(2) else bytes(data[:first])


def swap_blocks(data: bytearray, rng: np.random.Generator) -> bytes:
    size = BLOCK * int(rng.integers(1, 4))
    one, other = rng.integers((len(data) - size) // BLOCK, size=2) * BLOCK
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    return bytes(data)


def overwrite(data: bytearray, rng: np.random.Generator) -> bytes:
    size, start = int(rng.integers(1, 3 * BLOCK)), int(rng.integers(len(data)))
    data[start : start + size] = bytes(size) if rng.integers(2) else rng.bytes(size)
    return bytes(data)


def repeat_blocks(data: bytearray, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(len(data) // BLOCK, size=2) * BLOCK)
    return bytes(data[:last] + data[first:])


CHANGES: tuple[Change, ...] = (flip_bits, cut, swap_blocks, overwrite, repeat_blocks)


def epoch(shards: ShardList) -> list[Part]:
    order = Order(shards.counts, seed=0, lanes=2, per_lane=2, window=4)
    reader = LaneReader(shards, order, range(2), Cut(8000, 400, 60.0))
    return list(itertools.islice(reader, order.steps_per_epoch))


def delivered(parts: list[Part]) -> list[tuple[str, str, bytes]]:
    return sorted(
        (part.keys[place], part.captions[place], part.audio[place].tobytes())
        for part in parts
        for place, valid in enumerate(part.valid)
        if valid
    )


def encoded(clip: Clip, extension: str) -> EncodedClip:
    """As original files are packed."""
    if extension == "flac":
        return encode_clip(clip)
    content = io.BytesIO()
    form, subtype = {"wav": ("WAV", "FLOAT"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", "MPEG_LAYER_III")}[extension]
    soundfile.write(content, clip.audio, clip.sample_rate, format=form, subtype=subtype)
    description = describe(clip.key, clip.captions, clip.classes, clip.extra)
    seconds = len(clip.audio) / clip.sample_rate
    return EncodedClip(clip.key, content.getvalue(), extension, description, clip.sample_rate, seconds, clip.classes)


def corrupt_and_read(
    folder: Path, make_clip: Callable[..., Clip], seeds: range, extensions: tuple[str, ...] = ("flac",)
) -> dict[str, int]:
    clips = (encoded(make_clip(number), extensions[number % len(extensions)]) for number in range(15))
    write_shards(clips, folder, "train", clips_per_shard=5)
    shards = ShardList.load(folder)
    healthy = delivered(epoch(shards))
    assert len(healthy) == 15
    outcomes = {"harmless": 0, "named": 0}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        path = shards.paths[rng.integers(3)]
        original = path.read_bytes()
        path.write_bytes(CHANGES[seed % len(CHANGES)](bytearray(original), rng))
        parts = epoch(shards)
        path.write_bytes(original)
        names = [record for part in parts for record in (*part.bad, *part.notices)]
        met = delivered(parts)
        untouched = [row for row in healthy if int(row[0][-3:]) // 5 != shards.paths.index(path)]
        assert len({key for key, _, _ in met}) == len(met), seed
        assert [row for row in met if row in untouched] == untouched, seed
        assert len(met) + sum(len(part.bad) for part in parts) == 15, seed
        assert {record["shard"] for record in names} <= {path.name}, seed
        assert names or met == healthy, seed
        assert all(np.abs(np.frombuffer(audio, np.float32)).max() <= LOUDEST for _, _, audio in met), seed  # no NaN is
        outcomes["named" if names else "harmless"] += 1
    return outcomes


FORMATS = pytest.mark.parametrize("extensions", [("flac",), ("wav", "ogg", "mp3")], ids="-".join)


@FORMATS
def test_a_thousand_corruptions(tmp_path: Path, make_clip: Callable[..., Clip], extensions: tuple[str, ...]) -> None:
    outcomes = corrupt_and_read(tmp_path, make_clip, range(1000), extensions)
    assert outcomes["named"] > 900


@pytest.mark.slow
@FORMATS
def test_ten_thousand_corruptions(tmp_path: Path, make_clip: Callable[..., Clip], extensions: tuple[str, ...]) -> None:
    outcomes = corrupt_and_read(tmp_path, make_clip, range(1000, 11_000), extensions)
    assert sum(outcomes.values()) == 10_000
