"""Features of frozen encoders: what the encoders give, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ask_dist.data.audio import fit_length
from ask_dist.data.pack import write_shards
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.shards import Clip, ShardList
from ask_dist.errors import InputError
from ask_dist.models.frozen import ARRAYS, CLIPS, FrozenFeatures, frozen_features
from ask_dist.models.minilm import FolderTextEncoder, minilm_folder

SECONDS = 1.5


def clip(number: int) -> Clip:
    audio = 0.2 * np.random.default_rng(number).standard_normal(20_000 + 1000 * number).astype(np.float32)
    captions = tuple(f"noise number {number}, version {version}" for version in range(1 + number % 2))
    return Clip(f"noise-{number}", audio, 16_000, captions, ("noise",), {"swapped": number == 1, "colour": "white"})


def read(shards: ShardList, sample_rate: int, seconds: float) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    for path, count in zip(shards.paths, shards.counts, strict=True):
        for raw in read_shard(path, 0, count):
            audio, description = open_clip(raw, sample_rate)
            yield raw.key, fit_length(audio, round(seconds * sample_rate), None), description


def unread(shards: ShardList, sample_rate: int, seconds: float) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    raise AssertionError("clips were read although the cache has them")


@pytest.fixture
def shards(tmp_path) -> ShardList:
    write_shards(map(clip, range(5)), tmp_path / "train", "train", clips_per_shard=3)
    return ShardList.load(tmp_path / "train")


@pytest.fixture
def features(shards, yamnet, minilm, tmp_path):
    def compute(reader: Any = read, split: ShardList = shards, seconds: float = SECONDS, text: Any = minilm):
        return frozen_features(
            split, reader, yamnet, text, clip_seconds=seconds, cache=tmp_path / "cache", batch_size=2
        )

    return compute


def assert_same(one: FrozenFeatures, other: FrozenFeatures) -> None:
    for name in ("audio", "text", "owner"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.keys, one.descriptions) == (other.keys, other.descriptions)


def test_they_are_what_the_encoders_give_in_the_order_of_the_clips(features, shards, yamnet, minilm):
    found = features()
    assert found.keys == [f"noise-{number}" for number in range(5)]
    assert found.owner.tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert found.swapped.tolist() == [False, True, False, False, False]
    assert found.classes == [["noise"]] * 5
    assert found.descriptions[0]["colour"] == "white"
    assert found.audio.shape == (5, 3, 1024)
    assert (found.audio.dtype, found.text.dtype) == (torch.float16, torch.float32)
    waveforms = torch.stack([torch.from_numpy(audio) for _, audio, _ in read(shards, 16_000, SECONDS)])
    torch.testing.assert_close(found.audio.float(), yamnet.patches(waveforms), atol=1e-3, rtol=1e-3)
    flat = [caption for captions in found.captions for caption in captions]
    torch.testing.assert_close(found.text, minilm(minilm.tokenize(flat)), atol=1e-5, rtol=0)


def test_an_encoder_without_patches_gives_its_vector(shards, model, tmp_path):
    found = frozen_features(shards, read, model.audio, model.text, clip_seconds=SECONDS, cache=tmp_path / "cache")
    assert found.audio.shape == (5, 1, model.audio.output_dim)


def test_the_second_call_reads_no_clip(features):
    assert_same(features(), features(unread))


def test_other_clips_lengths_or_encoders_are_computed_anew(features, yamnet, tmp_path):
    features()
    write_shards(map(clip, range(1, 6)), tmp_path / "other", "train")
    bias = yamnet.classifier.bias.detach().clone()
    changes: list[dict[str, Any]] = [
        {"split": ShardList.load(tmp_path / "other")},
        {"seconds": 1.0},
        {"text": FolderTextEncoder(minilm_folder(), max_tokens=8)},
    ]
    for change in changes:
        with pytest.raises(AssertionError, match="clips were read"):
            features(unread, **change)
    try:
        yamnet.classifier.bias.data.add_(1.0)
        with pytest.raises(AssertionError, match="clips were read"):
            features(unread)
    finally:
        yamnet.classifier.bias.data.copy_(bias)
    features(unread)


@pytest.mark.parametrize("name", [ARRAYS, CLIPS])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_cache_is_replaced(features, tmp_path, name, damage):
    before = features()
    (path,) = Path(tmp_path / "cache").glob(f"*/{name}")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    assert_same(features(), before)
    assert_same(features(unread), before)


def test_a_split_without_a_good_clip_is_refused(features, tmp_path):
    with pytest.raises(InputError, match="no clip to encode"):
        features(lambda shards, sample_rate, seconds: iter(()))
    assert not list(tmp_path.glob(f"cache/*/{CLIPS}"))
