"""Cached vectors of frozen towers: what the towers give, of the very batches, computed once."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.data.cache import file_sha256
from ask_dist.data.leaks import HeldOut
from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip, ShardList
from ask_dist.errors import InputError
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train import start
from ask_dist.train.embeddings import FOLDER, Embeddings, cached_embeddings, refuse_long_clips
from tests.ranks import run_ranks

RATE, SECONDS, CLIPS, BATCH = 16000, 0.5, 22, 8


def noise(number: int, seconds: float = SECONDS) -> Clip:
    audio = np.random.default_rng(number).normal(scale=0.1, size=round(seconds * RATE)).astype(np.float32)
    captions = (f"noise number {number}", "a noise", f"the noise {number}")[: 1 + number % 3]
    return Clip(f"clip-{number:02d}", audio, RATE, captions)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_shards(map(noise, range(CLIPS)), tmp_path / "train", "train", clips_per_shard=8)
    return configured(tmp_path)


def configured(folder: Path, **model: Any) -> Config:
    frozen = {"audio": {"width": 8, "freeze": True}, "text": {"width": 32, "heads": 2, "freeze": True}}
    tree = {
        "name": "noise",
        "output_dir": str(folder / "runs"),
        "data": {"train": str(folder / "train"), "clip_seconds": SECONDS, "lanes": 2, "cache_embeddings": True},
        "model": {"embedding_dim": 16, **frozen, **model},
        "optimization": {"micro_batch_size": BATCH},
    }
    return configuration.parse(tree)


def make_model(config: Config, seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    vocabulary = Vocabulary.train([f"the noise number {n}" for n in range(CLIPS)], 300)
    return build_dual_encoder(config.model, RATE, vocabulary).train()


def batches(
    shards: ShardList, embeddings: Embeddings, model: DualEncoder, count: int = 9, length_step: float | None = None
) -> list[Batch]:
    loader = TrainLoader(
        shards,
        rank=0,
        world_size=1,
        local_batch_size=BATCH,
        seed=5,
        sample_rate=RATE,
        clip_seconds=SECONDS,
        lanes=2,
        max_bad_share=0.5,
        tokenize=model.text.portable_tokenize(),
        length_step=length_step,
    )
    embeddings.feed(model, loader)
    stream = loader.batches()
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


def assert_same_features(config: Config) -> list[Batch]:
    """Over three epochs, with and without the cache: batches, and features of the model as it trains."""
    shards, model, cached_model = ShardList.load(config.data.train), make_model(config), make_model(config)
    embeddings = cached_embeddings(config, cached_model, shards)
    step = config.data.length_step
    plain = batches(shards, Embeddings(), model, length_step=step)
    cached = batches(shards, embeddings, cached_model, length_step=step)
    for one, other in zip(plain, cached, strict=True):
        assert (one.keys, one.captions) == (other.keys, other.captions)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.valid, other.valid)
        torch.manual_seed(one.step)  # of the heads' dropout
        wanted = model(*Embeddings().inputs(one))
        torch.manual_seed(one.step)
        got = cached_model(*embeddings.inputs(other))
        for name in ("audio_features", "text_features"):
            rows = getattr(got, name)[one.valid], getattr(wanted, name)[one.valid]
            torch.testing.assert_close(*rows, atol=1e-5, rtol=0)
    return cached


def test_a_model_on_cached_vectors_trains_as_without(config):
    cached = assert_same_features(config)
    assert all(batch.audio.shape == batch.tokens.shape == (BATCH, 0) for batch in cached)
    assert {caption for batch in cached for caption in batch.captions} >= {"a noise", "noise number 4"}


def test_clips_of_their_own_lengths_have_vectors_of_their_own(config):
    clips = (noise(n, 0.07 * (1 + n % 7)) for n in range(CLIPS))
    write_shards(clips, Path(config.data.train), "train", clips_per_shard=8)
    assert_same_features(config)
    own = config.model_copy(update={"data": config.data.model_copy(update={"length_step": 0.1})})
    assert_same_features(own)
    assert len(list((config.run_dir.parent / FOLDER).iterdir())) == 3  # captions are the same


@pytest.mark.parametrize("learning", ["audio", "text"])
def test_one_frozen_tower_is_enough(tmp_path, config, learning):
    settings = config.model.model_dump()[learning] | {"freeze": False}
    config = configured(tmp_path, **{learning: settings})
    cached = assert_same_features(config)
    assert cached[0].audio.shape == (BATCH, round(SECONDS * RATE) if learning == "audio" else 0)
    assert len(list((config.run_dir.parent / FOLDER).iterdir())) == 1


def forbid(tower: nn.Module, _inputs: Any) -> None:
    raise AssertionError(f"{type(tower).__name__} was run")


def test_what_is_on_disk_is_not_computed_again(config):
    shards, model = ShardList.load(config.data.train), make_model(config)
    cached_embeddings(config, model, shards)
    files = sorted((config.run_dir.parent / FOLDER).rglob("*.safetensors"))
    assert len(files) == 2 * len(shards.paths)
    model.audio.register_forward_pre_hook(forbid)
    model.text.register_forward_pre_hook(forbid)
    cached_embeddings(config, model, shards)
    damaged = files[0]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(AssertionError, match="was run"):
        cached_embeddings(config, model, shards)
    assert_same_features(config)


def test_other_weights_have_other_vectors(config):
    shards = ShardList.load(config.data.train)
    ids = batches(shards, Embeddings(), make_model(config), 1)[0].ids.numpy()
    one, other = (cached_embeddings(config, make_model(config, seed), shards) for seed in (0, 1))
    assert not torch.allclose(one.audio.rows(ids), other.audio.rows(ids))
    assert len(list((config.run_dir.parent / FOLDER).iterdir())) == 4


def test_towers_that_no_run_uses_make_room_the_oldest_first(tmp_path, config):
    config = configured(tmp_path, text={"width": 32, "heads": 2})  # one frozen tower: a folder a seed
    shards, folder = ShardList.load(config.data.train), config.run_dir.parent / FOLDER

    def encode(seed: int, gib: float) -> Embeddings:
        data = config.data.model_copy(update={"cache_gib": gib})
        return cached_embeddings(config.model_copy(update={"data": data}), make_model(config, seed), shards)

    def there() -> set[Path]:
        return set(folder.iterdir())

    held = encode(0, gib=1.0)
    (zero,) = there()
    size = sum(file.stat().st_size for file in zero.iterdir()) / 2**30
    encode(1, gib=1.0)  # no run uses this one any more
    (one,) = there() - {zero}
    encode(2, gib=1.0)
    (two,) = there() - {zero, one}
    os.utime(zero, (0, 0))
    os.utime(one, (1, 1))
    encode(3, gib=3.5 * size)
    assert one not in there()  # the oldest but one, which is in use
    assert len(there()) == 3
    assert {zero, two} < there()
    encode(2, gib=1.0)  # used again
    encode(4, gib=2.5 * size)
    assert len(there()) == 2
    assert zero in there()
    ids = batches(shards, Embeddings(), make_model(config), 1)[0].ids.numpy()
    assert held.audio.rows(ids).any()
    del held
    encode(5, gib=0.5 * size)
    assert len(there()) == 1  # its own
    assert zero not in there()


def test_a_clip_that_cannot_be_decoded_is_the_same_bad_sample(tmp_path, config):
    silent = Clip("silent", np.zeros(8000, np.float32), RATE, ("nothing",))
    write_shards([*map(noise, range(7))], tmp_path / "train", "train", clips_per_shard=8)
    write_shards([noise(8), noise(9)], tmp_path / "more", "more", clips_per_shard=8)
    add_to_shard(tmp_path / "more", silent)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": (tmp_path / "train", tmp_path / "more")})}
    )
    shards, model = ShardList.load(config.data.train), make_model(config)
    embeddings = cached_embeddings(config, model, shards)
    assert embeddings.audio.bad == {"silent": "silent audio: peak 0.0e+00, at least 1e-04 is needed"}
    cached = assert_same_features(config)
    assert not any("silent" in batch.keys for batch in cached)


def test_a_clip_that_sounds_like_a_held_out_one_is_the_same_bad_sample(tmp_path, config):
    longer = [noise(number, 2.0) for number in range(10)]
    write_shards(longer, tmp_path / "train", "train", clips_per_shard=4)
    later = Clip("later", 0.2 * longer[6].audio[4321:], RATE, ("a noise",))
    write_shards([later], tmp_path / "test", "test")
    config = config.model_copy(update={"data": config.data.model_copy(update={"clip_seconds": 2.0})})
    shards, model = ShardList.load(tmp_path / "train"), make_model(config)
    held_out = HeldOut.of({"test": ShardList.load(tmp_path / "test")}, fingerprints=True)
    reason = "held out: it sounds like test as later"
    for _ in range(2):  # the second time out of the files
        embeddings = cached_embeddings(config, model, shards, held_out)
        assert embeddings.audio.bad == {"clip-06": reason}
    cached = batches(shards, embeddings, model)
    assert {key for batch in cached for key in batch.keys} == {clip.key for clip in longer} - {"clip-06"} | {""}
    assert cached_embeddings(config, model, shards).audio.bad == {}  # other files: nothing was compared
    assert len(list((config.run_dir.parent / FOLDER).iterdir())) == 3  # and one of captions


def add_to_shard(folder: Path, clip: Clip) -> None:
    """Adds a clip that `write_shards` would refuse, and lists the shard as it is then."""
    (shard,) = folder.glob("*.tar")
    buffer = io.BytesIO()
    soundfile.write(buffer, clip.audio, RATE, format="FLAC")
    with tarfile.open(shard, "a") as archive:
        for extension, content in (
            ("flac", buffer.getvalue()),
            ("json", json.dumps({"captions": list(clip.captions)}).encode()),
        ):
            member = tarfile.TarInfo(f"{clip.key}.{extension}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sizes = json.loads((folder / "sizes.json").read_text())
    sizes["shards"][shard.name] |= {"clips": 3, "sha256": file_sha256(shard)}
    (folder / "sizes.json").write_text(json.dumps(sizes))


def test_a_clip_that_would_be_cropped_is_refused_before_the_run_and_in_it(tmp_path, config):
    shards = ShardList.load(config.data.train)
    refuse_long_clips(config, shards, range(len(shards.paths)))
    write_shards([*map(noise, range(5)), noise(5, 0.6)], tmp_path / "train", "train", clips_per_shard=8)
    shards = ShardList.load(config.data.train)
    wanted = r"train-000000.tar clip-05 has 0.60 s, over data.clip_seconds=0.5: .*data.cache_embeddings"
    with pytest.raises(InputError, match=wanted):
        refuse_long_clips(config, shards, range(len(shards.paths)))
    with pytest.raises(InputError, match=wanted):
        cached_embeddings(config, make_model(config), shards)


def test_a_shard_that_is_not_what_was_packed_is_refused(config):
    shards, model = ShardList.load(config.data.train), make_model(config)
    intact = shards.paths[1].read_bytes()
    shards.paths[1].write_bytes(intact[: len(intact) // 2])
    with pytest.raises(InputError, match=r"train-000001.tar: its SHA-256 .*restore it or pack again"):
        cached_embeddings(config, model, shards)
    shards.paths[1].write_bytes(intact)
    embeddings = cached_embeddings(config, model, shards)
    with pytest.raises(InputError, match="no vector of one of its clips"):
        embeddings.audio.rows(np.array([12345]))


def both_ranks(rank: int, folder: str) -> list[torch.Tensor]:
    config = configured(Path(folder))
    shards, model = ShardList.load(config.data.train), make_model(config)
    embeddings = cached_embeddings(config, model, shards, rank=rank, world_size=2)
    plain = batches(shards, Embeddings(), make_model(config), 3)
    return [embeddings.audio.rows(batch.ids.numpy()) for batch in plain]


@pytest.mark.multiprocess
def test_ranks_share_the_work_and_each_has_all_of_it(tmp_path, config):
    one, other = run_ranks(both_ranks, 2, tmp_path / "ranks", str(tmp_path))
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.any(dim=1).sum() > 0


def beside_a_broken_disk(rank: int, folder: str) -> list[Any]:
    """What a rank reads of the test split by itself, what the ranks hold out, and what then has no vector."""
    config = configured(Path(folder))
    data = config.data.model_copy(update={"clip_seconds": 2.0, "fingerprints": True})
    config = config.model_copy(update={"data": data})
    shards = {"train": ShardList.load(config.data.train), "test": ShardList.load(Path(folder, f"test-{rank}"))}
    model = make_model(config)
    held_out = start.held_out_clips(config, shards, rank, world_size=2)
    embeddings = cached_embeddings(config, model, shards["train"], held_out, rank, world_size=2)
    return [sorted(HeldOut.of(shards).keys), sorted(held_out.keys), embeddings.audio.bad]


@pytest.mark.multiprocess
def test_ranks_refuse_the_same_if_one_cannot_read_all_that_is_held_out(tmp_path):
    longer = [noise(number, 2.0) for number in range(10)]
    write_shards(longer, tmp_path / "train", "train", clips_per_shard=4)
    cut = [Clip(f"cut-{n}", 0.2 * longer[n].audio[4321:], RATE, ("a noise",)) for n in (1, 6)]
    for rank in (0, 1):
        write_shards(cut, tmp_path / f"test-{rank}", "test", clips_per_shard=1)
    damaged = tmp_path / "test-1" / "test-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:100])
    one, other = run_ranks(beside_a_broken_disk, 2, tmp_path / "ranks", str(tmp_path))
    assert one[0] == ["cut-1", "cut-6"]
    assert other[0] == ["cut-1"]
    assert one[1:] == other[1:]
    assert one[1:] == [one[0], {f"clip-0{n}": f"held out: it sounds like test as cut-{n}" for n in (1, 6)}]
