from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_dist.data.loader import Batch, EvalLoader, TrainLoader
from ask_dist.data.pack import write_shards
from ask_dist.data.samples import read_shard
from ask_dist.data.shards import Clip, ShardList, stable_id
from ask_dist.errors import InputError
from ask_dist.models.text import TransformerTextEncoder, Vocabulary

MakeClip = Callable[..., Clip]


def loader(shards: ShardList, **changes: Any) -> TrainLoader:
    options: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "local_batch_size": 16,
        "seed": 3,
        "sample_rate": 8000,
        "clip_seconds": 0.05,
        "shuffle_window": 8,
    }
    return TrainLoader(shards, **options | changes)


def take(source: TrainLoader, count: int, start: int = 0) -> list[Batch]:
    stream = source.batches(start)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.epoch, one.step, one.keys, one.captions) == (other.epoch, other.step, other.keys, other.captions)
    for name in ("ids", "audio", "tokens", "valid", "swapped"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def valid_rows(batches: list[Batch]) -> list[tuple[int, str, str, bytes]]:
    return [
        (int(batch.ids[row]), batch.keys[row], batch.captions[row], batch.audio[row].numpy().tobytes())
        for batch in batches
        for row in range(len(batch.keys))
        if batch.valid[row]
    ]


def test_an_epoch_delivers_every_clip_once_with_what_belongs_to_it(shards: ShardList, make_clip: MakeClip) -> None:
    source = loader(shards)
    batches = take(source, source.steps_per_epoch)
    rows = valid_rows(batches)
    assert sorted(key for _, key, _, _ in rows) == [f"clip-{number:03d}" for number in range(103)]
    for clip_id, key, caption, audio in rows:
        clip = make_clip(int(key[-3:]))
        assert clip_id == stable_id(key)
        assert caption in clip.captions
        np.testing.assert_allclose(np.frombuffer(audio, np.float32), clip.audio, atol=1e-4)
    swapped = {key for batch in batches for key, flag in zip(batch.keys, batch.swapped, strict=True) if flag}
    assert swapped == {f"clip-{number:03d}" for number in range(0, 103, 5)}
    assert all(batch.audio.dtype == torch.float32 and batch.ids.dtype == torch.int64 for batch in batches)
    assert source.bad.records == []


def test_padding_is_marked_and_filled_with_a_valid_sample(shards: ShardList) -> None:
    source = loader(shards)
    *_, last = take(source, source.steps_per_epoch)
    assert 0 < int(last.valid.sum()) < 16
    donor = int(last.valid.nonzero()[0])
    for row in range(16):
        if not last.valid[row]:
            assert (int(last.ids[row]), last.keys[row], last.captions[row]) == (-1, "", last.captions[donor])
            assert torch.equal(last.audio[row], last.audio[donor])


def test_a_batch_without_any_valid_sample_is_zeros(tmp_path: Path, make_clip: MakeClip) -> None:
    write_shards([make_clip(1), make_clip(2)], tmp_path, "train")
    (batch,) = take(loader(ShardList.load(tmp_path), rank=0, world_size=4, local_batch_size=2), 1)
    assert not batch.valid.any()
    assert not batch.audio.any()
    assert batch.captions == ["", ""]


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000), lanes=st.sampled_from([8, 16]), window=st.integers(1, 40), size=st.sampled_from([16, 48])
)
def test_global_batches_are_the_same_on_any_number_of_ranks(
    shards: ShardList, seed: int, lanes: int, window: int, size: int
) -> None:
    def global_batches(world_size: int) -> list[list[tuple[int, str, str, bytes]]]:
        ranks = [
            take(
                loader(
                    shards,
                    rank=rank,
                    world_size=world_size,
                    local_batch_size=size // world_size,
                    seed=seed,
                    lanes=lanes,
                    shuffle_window=window,
                ),
                9,
            )
            for rank in range(world_size)
        ]
        return [valid_rows([batches[step] for batches in ranks]) for step in range(9)]

    alone = global_batches(1)
    assert all(global_batches(world_size) == alone for world_size in (2, 4, 8))


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 25), seed=st.integers(0, 5), rank=st.integers(0, 1), window=st.integers(1, 40))
def test_resuming_from_any_step_gives_the_uninterrupted_stream(
    shards: ShardList, start: int, seed: int, rank: int, window: int
) -> None:
    options = {"rank": rank, "world_size": 2, "local_batch_size": 8, "seed": seed, "shuffle_window": window}
    whole = take(loader(shards, **options), start + 3)
    for resumed, expected in zip(take(loader(shards, **options), 3, start), whole[start:], strict=True):
        assert_same(resumed, expected)


@pytest.mark.parametrize("processes", [0, 2])
def test_without_sounds_the_same_batches_come_with_their_captions_alone(shards: ShardList, processes: int) -> None:
    whole, silent = loader(shards), loader(shards, processes=processes, max_bad_share=0.5)
    silent.leave_out_sounds({"clip-007": "silent audio"})
    for one, other in zip(take(whole, 9), take(silent, 9), strict=True):
        left_out = torch.tensor([key == "clip-007" for key in one.keys])
        assert other.audio.shape == (16, 0)
        assert torch.equal(other.valid, one.valid & ~left_out)
        assert torch.equal(other.ids, one.ids.masked_fill(left_out, -1))
        for row in other.valid.nonzero():
            assert (other.keys[row], other.captions[row]) == (one.keys[row], one.captions[row])
    assert {(record["key"], record["reason"]) for record in silent.bad.records} == {("clip-007", "silent audio")}


def test_epochs_and_seeds_differ_in_order(shards: ShardList) -> None:
    source = loader(shards)
    steps = source.steps_per_epoch
    batches = take(source, 2 * steps)
    assert [batch.epoch for batch in batches] == [0] * steps + [1] * steps
    assert [batch.step for batch in batches] == list(range(2 * steps))
    orders = [
        [row[1] for row in valid_rows(part)]
        for part in (batches[:steps], batches[steps:], take(loader(shards, seed=4), steps))
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len(set(map(tuple, orders))) == 3


def test_captions_and_crops_are_drawn_anew_each_epoch(shards: ShardList) -> None:
    source = loader(shards, clip_seconds=0.01)
    rows = valid_rows(take(source, 6 * source.steps_per_epoch))
    seen = [row for row in rows if row[1] == "clip-002"]
    assert len(seen) == 6
    assert 1 < len({caption for _, _, caption, _ in seen}) <= 3
    assert len({audio for *_, audio in seen}) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [0, 1, 2])
def test_batches_lie_in_pinned_memory_where_there_is_a_gpu(shards: ShardList, processes: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("memory is pinned for a GPU alone, and torch sees none")
    for batch, other in zip(take(loader(shards, processes=processes), 6), take(loader(shards), 6), strict=True):
        assert batch.audio.is_pinned()
        assert batch.tokens.is_pinned()
        assert_same(batch, other)


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_decoding_processes_give_the_same_batches(shards: ShardList, processes: int) -> None:
    geometry = {"lanes": 3, "local_batch_size": 12}  # two processes share three lanes unequally
    expected = take(loader(shards, **geometry), 12, 5)  # in more turns than there are slots
    for batch, other in zip(take(loader(shards, processes=processes, **geometry), 12, 5), expected, strict=True):
        assert_same(batch, other)


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [0, 2])
def test_clips_of_their_own_lengths_come_in_the_same_order(tmp_path: Path, make_clip: MakeClip, processes: int) -> None:
    write_shards((make_clip(n, 30 + 17 * n) for n in range(41)), tmp_path, "train", clips_per_shard=10)
    shards = ShardList.load(tmp_path)
    whole = take(loader(shards), 8)
    own = loader(shards, processes=processes, length_step=0.0125)  # 100 samples of 400
    batches = take(own, 8)
    for one, other in zip(whole, batches, strict=True):
        assert_same(one, other)
        assert one.lengths is None
        numbers = [int(key[-3:]) for key in other.keys if key]
        wanted = [min(400, -(-(30 + 17 * number) // 100) * 100) for number in numbers]
        assert other.lengths is not None
        assert other.lengths[other.valid].tolist() == wanted
        donor = int(other.lengths[other.valid.nonzero()[0]])
        assert (other.lengths[~other.valid] == donor).all()
        for row, length in zip(other.audio, other.lengths.tolist(), strict=True):
            assert not row[length:].any()
    assert {length for batch in batches for length in batch.lengths.tolist()} == {100, 200, 300, 400}
    (resumed,) = take(own, 1, 5)
    assert_same(resumed, batches[5])
    assert torch.equal(resumed.lengths, batches[5].lengths)
    options: dict[str, Any] = {"batch_size": 16, "sample_rate": 8000, "clip_seconds": 0.05, "length_step": 0.0125}
    read = list(EvalLoader(shards, rank=0, world_size=1, **options).batches())
    lengths = [length for batch in read for length in batch.lengths.tolist()]
    assert lengths == [min(400, -(-(30 + 17 * number) // 100) * 100) for number in range(41)]
    own.leave_out_sounds({})
    (silent,) = take(own, 1)
    assert silent.lengths is None


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [0, 1, 2])
def test_tokens_are_those_of_the_batchs_captions(
    tmp_path: Path, make_clip: MakeClip, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    clips = [replace(make_clip(n), captions=("a drum " * (n % 7) + f"number {n}",)) for n in range(41)]
    write_shards(clips, tmp_path, "train", clips_per_shard=10)
    vocabulary = Vocabulary.train(["a drum", "number"], 280)
    text = TransformerTextEncoder(vocabulary, width=16, layers=1, heads=2, max_tokens=24, dropout=0.0)
    geometry = {"lanes": 2, "local_batch_size": 4, "processes": processes}
    source = loader(ShardList.load(tmp_path), tokenize=text.portable_tokenize(), **geometry)
    batches = take(source, 2 * source.steps_per_epoch)
    assert any(not batch.valid.all() for batch in batches)
    for batch in batches:
        assert torch.equal(batch.tokens, text.tokenize(batch.captions))
    halves = [[int((half != 0).sum(dim=1).max()) for half in batch.tokens.chunk(2)] for batch in batches]
    assert any(one != other for one, other in halves)  # the processes' parts are not equally wide
    source.leave_out_tokens()
    (without,) = take(source, 1)
    assert without.tokens.shape == (4, 0)
    assert without.captions == batches[0].captions


def broken_copy(corpus: Path, folder: Path) -> ShardList:
    """The corpus with one shard cut in two and one of garbage."""
    copy = shutil.copytree(corpus, folder / "broken")
    cut = copy / "train-000003.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (copy / "train-000005.tar").write_bytes(b"garbage" * 1000)
    return ShardList.load(copy)


def test_bad_shards_become_invalid_places_on_every_rank(corpus: Path, tmp_path: Path) -> None:
    damaged = broken_copy(corpus, tmp_path)
    healthy = {
        raw.key
        for path, count in zip(damaged.paths, damaged.counts, strict=True)
        for raw in read_shard(path, 0, count)
        if raw.problem is None and {"flac", "json"} <= raw.members.keys()
    }
    assert 85 < len(healthy) < 93
    met: list[str] = []
    bad = 0
    for rank in range(2):
        source = loader(damaged, rank=rank, world_size=2, local_batch_size=8, max_bad_share=1.0)
        assert source.steps_per_epoch == loader(damaged).steps_per_epoch
        met += [key for _, key, _, _ in valid_rows(take(source, source.steps_per_epoch))]
        bad += source.bad.count
        assert len(source.bad.records) <= 4
        assert {record["shard"] for record in source.bad.records} <= {"train-000003.tar", "train-000005.tar"}
        assert source.bad.delivered < 60
    assert sorted(met) == sorted(healthy)
    assert bad == 103 - len(healthy)


def test_bad_clips_are_named_and_counted_but_not_delivered(tmp_path: Path, make_clip: MakeClip) -> None:
    write_shards(map(make_clip, range(40)), tmp_path, "train", clips_per_shard=40)
    shards = ShardList.load(tmp_path)
    tar = shards.paths[0]
    data = tar.read_bytes()
    raw = next(read_shard(tar, 7, 1)).members["json"]
    tar.write_bytes(data.replace(raw, b"{" + b" " * (len(raw) - 1)))
    source = loader(shards, max_bad_share=0.05)
    rows = valid_rows(take(source, 2 * source.steps_per_epoch))
    assert "clip-007" not in {row[1] for row in rows}
    assert len(rows) == 78
    changed, bad = source.bad.records
    assert (changed["shard"], changed["key"]) == ("train-000000.tar", "")
    assert "SHA-256" in changed["reason"]
    assert (bad["shard"], bad["key"]) == ("train-000000.tar", "clip-007")
    assert "unusable JSON" in bad["reason"]
    assert source.bad.count == 2  # once each epoch
    strict = loader(shards, max_bad_share=0.01)
    with pytest.raises(InputError, match=r"1 of 40 samples are bad, over max_bad_share 0\.01.*clip-007"):
        take(strict, 2 * strict.steps_per_epoch)


def test_one_bad_shard_is_spared_where_it_is_a_small_share_of_the_corpus(tmp_path: Path, make_clip: MakeClip) -> None:
    write_shards(map(make_clip, range(250)), tmp_path, "train", clips_per_shard=25)
    first, second, *_ = sorted(tmp_path.glob("*.tar"))
    first.write_bytes(b"garbage" * 1000)
    kept = 0
    for rank in range(2):  # for one of them it is up to a fifth of the epoch
        source = loader(ShardList.load(tmp_path), rank=rank, world_size=2, local_batch_size=8, max_bad_share=0.1)
        kept += len(valid_rows(take(source, 3 * source.steps_per_epoch)))
    assert kept == 3 * 225
    second.write_bytes(b"garbage" * 1000)
    source = loader(ShardList.load(tmp_path), max_bad_share=0.1)
    with pytest.raises(InputError, match=r"of \d+ samples are bad, over max_bad_share 0\.1"):
        take(source, source.steps_per_epoch)


def test_too_many_bad_samples_stop_a_run_before_the_epoch_ends(tmp_path: Path, make_clip: MakeClip) -> None:
    write_shards(map(make_clip, range(200)), tmp_path, "train", clips_per_shard=50)
    for path in sorted(tmp_path.glob("*.tar")):
        path.write_bytes(b"garbage" * 1000)
    source = loader(ShardList.load(tmp_path))
    with pytest.raises(InputError, match=r"32 of 32 samples are bad.*pack the shards again or raise max_bad_share"):
        take(source, source.steps_per_epoch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_batch_size": 12}, "make local_batch_size a multiple of 8"),
        ({"local_batch_size": 3, "world_size": 2}, r"a global batch of 6 \(3 x 2 ranks\) over 8 lanes.*multiple of 4"),
        ({"world_size": 3}, "set lanes to a multiple of 3"),
        ({"local_batch_size": 0}, "multiple of 8"),
    ],
)
def test_a_geometry_that_does_not_fit_is_refused(shards: ShardList, changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loader(shards, **changes)


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_evaluation_reads_every_clip_once_with_all_its_captions(
    shards: ShardList, make_clip: MakeClip, world_size: int
) -> None:
    keys: list[str] = []
    for rank in range(world_size):
        options = {"batch_size": 16, "sample_rate": 8000, "clip_seconds": 0.025}
        for batch in EvalLoader(shards, rank=rank, world_size=world_size, **options).batches():
            keys += batch.keys
            for row, key in enumerate(batch.keys):
                clip = make_clip(int(key[-3:]))
                assert batch.captions[row] == list(clip.captions)
                assert batch.classes[row] == list(clip.classes)
                assert int(batch.ids[row]) == stable_id(key)
                np.testing.assert_allclose(batch.audio[row], clip.audio[100:300], atol=1e-4)
    assert keys == [f"clip-{number:03d}" for number in range(103)]


def test_evaluation_can_be_limited_and_skips_bad_samples(corpus: Path, shards: ShardList, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 16, "sample_rate": 8000, "clip_seconds": 0.05}
    ranks = [EvalLoader(shards, rank=rank, world_size=2, limit=25, **options) for rank in range(2)]
    assert [sum(len(batch.keys) for batch in rank.batches()) for rank in ranks] == [12, 13]
    damaged = broken_copy(corpus, tmp_path)
    whole = EvalLoader(damaged, rank=0, world_size=1, **options)
    for _ in range(2):
        read = sum(len(batch.keys) for batch in whole.batches())
        assert read + whole.bad.count == 103
        assert whole.bad.count > 10
    for path in damaged.paths:
        path.write_bytes(b"")
    assert not list(whole.batches())
    assert whole.bad.count == 103


def test_corpora_are_mixed_by_weight(tmp_path: Path, make_clip: MakeClip) -> None:
    write_shards(map(make_clip, range(20)), tmp_path / "a", "train", clips_per_shard=8)
    write_shards(map(make_clip, range(20, 60)), tmp_path / "b", "train", clips_per_shard=8)
    both = [tmp_path / "a", tmp_path / "b"]
    shards = ShardList.load(both, [2, 0.5])
    assert shards.clips == 60
    assert shards.fingerprint != ShardList.load(both).fingerprint
    assert ShardList.load(both, [1, 1]).fingerprint == ShardList.load(both).fingerprint
    source = loader(shards, clip_seconds=0.04)
    rows = valid_rows(take(source, source.steps_per_epoch))
    often = Counter(key for _, key, _, _ in rows)
    assert Counter(often[f"clip-{number:03d}"] for number in range(20)) == {2: 20}
    assert Counter(often[f"clip-{number:03d}"] for number in range(20, 60)) == {0: 20, 1: 20}
    assert len({row for row in rows if row[1] == "clip-002"}) == 2  # another crop or caption at the second turn
    damaged = shards.paths[0]
    damaged.write_bytes(b"")
    take(again := loader(shards, max_bad_share=1.0), source.steps_per_epoch)
    assert {record["shard"] for record in again.bad.records} == {str(damaged)}  # names repeat: the folder tells


def test_weights_that_leave_nothing_are_refused(tmp_path: Path, make_clip: MakeClip) -> None:
    write_shards(map(make_clip, range(4)), tmp_path, "train")
    with pytest.raises(InputError, match=r"raise data\.weights"):
        loader(ShardList.load(tmp_path, [0.01]))
