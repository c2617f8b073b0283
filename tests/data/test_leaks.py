from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.data.audio import BadSample
from ask_dist.data.cache import ShardCache
from ask_dist.data.fingerprints import Fingerprints
from ask_dist.data.leaks import HeldOut, audit, sound_digest, words
from ask_dist.data.loader import EvalLoader, TrainLoader
from ask_dist.data.pack import EncodedClip, describe, write_shards
from ask_dist.data.samples import Raw
from ask_dist.data.shards import Clip, ShardList
from tests.data.server import serving

MakeClip = Callable[..., Clip]
RATE = 8000


def flac(audio: np.ndarray, level: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, 8000, format="FLAC", subtype="PCM_16", compression_level=level)
    return file.getvalue()


def test_the_digest_of_a_flac_is_that_of_its_samples(make_clip: MakeClip) -> None:
    audio = make_clip(1, 4000).audio
    fast, small = flac(audio, 0.0), flac(audio, 1.0)
    assert fast != small
    assert sound_digest(fast) == sound_digest(small) != sound_digest(flac(audio[1:], 0.0))
    assert sound_digest(b"one") == sound_digest(b"one") != sound_digest(b"two")


@pytest.fixture
def splits(tmp_path: Path, make_clip: MakeClip) -> dict[str, ShardList]:
    """Training clips 0..39; the test split has clips 5 and 6, and the sound of clip 7 under another key."""
    write_shards(map(make_clip, range(40)), tmp_path / "train", "train", clips_per_shard=8)
    renamed = Clip("other", make_clip(7).audio, 8000, ("another caption",))
    write_shards([make_clip(5), make_clip(6), renamed], tmp_path / "test", "test")
    write_shards([make_clip(100)], tmp_path / "validation", "validation")
    return {split: ShardList.load(tmp_path / split) for split in ("train", "validation", "test")}


def test_training_refuses_and_names_what_is_held_out(splits: dict[str, ShardList]) -> None:
    held_out = HeldOut.of(splits)
    options = {"local_batch_size": 8, "seed": 0, "sample_rate": 8000, "clip_seconds": 0.05, "max_bad_share": 0.1}
    loaders = [TrainLoader(splits["train"], rank=0, world_size=1, held_out=out, **options) for out in (held_out, None)]
    met = []
    for loader in loaders:
        batches = list(itertools.islice(loader.batches(), loader.steps_per_epoch))
        met.append({key for batch in batches for key in batch.keys} - {""})
    assert met[1] - met[0] == {"clip-005", "clip-006", "clip-007"}
    assert loaders[0].steps_per_epoch == loaders[1].steps_per_epoch
    assert loaders[0].bad.count == 3
    assert {record["key"]: record["reason"] for record in loaders[0].bad.records} == {
        "clip-005": "held out: its key is in test",
        "clip-006": "held out: its key is in test",
        "clip-007": "held out: the same sound is in test as other",
    }


def test_so_does_the_encoding_of_a_bank(splits: dict[str, ShardList]) -> None:
    options = {"rank": 0, "world_size": 1, "batch_size": 16, "sample_rate": 8000, "clip_seconds": 0.05}
    loader = EvalLoader(splits["train"], held_out=HeldOut.of({"test": splits["test"]}), **options)
    assert sum(len(batch.keys) for batch in loader.batches()) == 37
    assert loader.bad.count == 3


@pytest.fixture
def cuts(tmp_path: Path, make_clip: MakeClip) -> dict[str, ShardList]:
    """Ten training clips of five recordings, one of which the test split has another cut of; some name none."""
    names = [*(["youtube:aaaaaaaaaaa"] * 2), *([f"freesound:{n}" for n in range(4)] * 2)]
    train = [
        Clip(f"cut-{n}", make_clip(n).audio, RATE, ("a noise",), (), {"recording": r}) for n, r in enumerate(names)
    ]
    write_shards([*train, make_clip(20)], tmp_path / "train", "train", clips_per_shard=4)
    told = {"recording": "youtube:aaaaaaaaaaa"}, {"recording": "freesound:33"}, {"recording": ""}, {"recording": 3}, {}
    test = [Clip(f"of-{n}", make_clip(50 + n).audio, RATE, ("a noise",), (), extra) for n, extra in enumerate(told)]
    write_shards(test, tmp_path / "test", "test")
    return {split: ShardList.load(tmp_path / split) for split in ("train", "test")}


def test_another_cut_of_a_recording_that_is_held_out_is_refused(cuts: dict[str, ShardList]) -> None:
    held_out = HeldOut.of(cuts)
    assert held_out.recordings == {"youtube:aaaaaaaaaaa": "test as of-0", "freesound:33": "test as of-1"}
    reason = "held out: its recording, youtube:aaaaaaaaaaa, is in test as of-0"
    assert [(record["key"], record["reason"]) for record in audit(cuts["train"], held_out)] == [
        ("cut-0", reason),
        ("cut-1", reason),
    ]
    options = {"rank": 0, "world_size": 1, "sample_rate": RATE, "clip_seconds": 0.05, "held_out": held_out}
    loader = TrainLoader(cuts["train"], local_batch_size=1, seed=0, lanes=1, max_bad_share=0.5, **options)
    met = {key for batch in itertools.islice(loader.batches(), loader.steps_per_epoch) for key in batch.keys} - {""}
    assert met == {*(f"cut-{n}" for n in range(2, 10)), "clip-020"}
    assert {record["reason"] for record in loader.bad.records} == {reason}
    encoded = list(EvalLoader(cuts["train"], batch_size=20, **options).batches())
    assert encoded[0].recordings == [*([f"freesound:{n}" for n in range(4)] * 2), ""]


def packed(key: str, audio: np.ndarray, extension: str) -> EncodedClip:
    file = io.BytesIO()
    soundfile.write(file, audio, RATE, format=extension.upper())
    description = describe(key, ["a noise"], [], {})
    return EncodedClip(key, file.getvalue(), extension, description, RATE, len(audio) / RATE, ())


def moving(number: int) -> np.ndarray:
    """Two seconds of noise of its own."""
    return np.random.default_rng(number).normal(scale=0.1, size=2 * RATE).astype(np.float32)


@pytest.fixture
def alike(tmp_path: Path) -> dict[str, ShardList]:
    """Ten training clips. The test split has number 3 as a quiet MP3 and the later part of number 8, as other clips."""
    train = [Clip(f"clip-{number}", moving(number), RATE, (f"noise {number}",)) for number in range(10)]
    write_shards(train, tmp_path / "train", "train", clips_per_shard=3)
    test = [
        packed("quiet", 0.1 * moving(3), "mp3"),
        packed("later", moving(8)[5000:], "flac"),
        packed("other", moving(50), "flac"),
    ]
    write_shards(test, tmp_path / "test", "test")
    return {split: ShardList.load(tmp_path / split) for split in ("train", "test")}


LIKE = {"clip-3": "held out: it sounds like test as quiet", "clip-8": "held out: it sounds like test as later"}


@pytest.mark.parametrize("processes", [0, 2])
def test_training_refuses_what_sounds_like_it_where_fingerprints_are_compared(
    alike: dict[str, ShardList], processes: int
) -> None:
    options = {"local_batch_size": 4, "seed": 3, "sample_rate": RATE, "clip_seconds": 1.0, "lanes": 2}
    options |= {"max_bad_share": 0.5, "processes": processes, "rank": 0, "world_size": 1}
    orders = {}
    for fingerprints in (True, False):
        held_out = HeldOut.of(alike, fingerprints=fingerprints)
        loader = TrainLoader(alike["train"], held_out=held_out, **options)
        stream = loader.batches()
        orders[fingerprints] = [key for batch in itertools.islice(stream, 9) for key in batch.keys]
        stream.close()
        assert {record["key"]: record["reason"] for record in loader.bad.records} == (LIKE if fingerprints else {})
        assert loader.bad.count == (6 if fingerprints else 0)
    assert orders[True] == ["" if key in LIKE else key for key in orders[False]]


def test_verdicts_are_kept(alike: dict[str, ShardList], monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = HeldOut.of(alike, fingerprints=True)
    options = {"rank": 0, "world_size": 1, "batch_size": 4, "sample_rate": RATE, "clip_seconds": 1.0}
    loader = EvalLoader(alike["train"], held_out=held_out, **options)
    first = [batch.keys for batch in loader.batches()]
    assert {record["key"]: record["reason"] for record in loader.bad.records} == LIKE
    monkeypatch.delattr(Fingerprints, "match")  # it would be missed if it were needed
    assert [batch.keys for batch in loader.batches()] == first
    assert loader.bad.count == 2
    with pytest.raises(AttributeError):
        held_out.refuse_likeness(Raw("train", "new", {}), moving(1), RATE)


def test_sounds_that_cannot_be_decoded_have_no_fingerprint(alike: dict[str, ShardList]) -> None:
    assert HeldOut.of(alike, fingerprints=True).fingerprints.match(moving(3), RATE) == "test as quiet"
    assert HeldOut.of(alike, fingerprints=True, max_clip_seconds=1.0).fingerprints.match(moving(3), RATE) is None
    damaged = alike["test"].paths[0]
    damaged.write_bytes(damaged.read_bytes().replace(b"fLaC", b"none"))
    held_out = HeldOut.of(alike, fingerprints=True)
    assert held_out.fingerprints.match(moving(3), RATE) == "test as quiet"
    assert held_out.fingerprints.match(moving(8), RATE) is None
    assert held_out.keys.keys() == {"quiet", "later", "other"}


def test_what_cannot_be_read_is_named_and_counted(
    splits: dict[str, ShardList], tmp_path: Path, make_clip: MakeClip
) -> None:
    assert (HeldOut.of(splits).unread, HeldOut.of(splits).warnings) == ((), ())
    write_shards(map(make_clip, range(20)), tmp_path / "far", "validation", clips_per_shard=15)
    garbage = splits["test"].paths[0]
    garbage.write_bytes(b"\1" * garbage.stat().st_size)
    with serving(tmp_path / "far") as server:
        server.faults["/validation-000001.tar"] = ["503"]
        cache = ShardCache(tmp_path / "cache", tries=1)
        far = ShardList.load(server.url, cache=cache)
        held_out = HeldOut.of({"train": splits["train"], "validation": far, "test": splits["test"]})
    assert len(held_out.keys) == 15
    lost, damaged = held_out.unread
    assert (lost["shard"], lost["key"], damaged["shard"], damaged["key"]) == (far.names[1], "", "test-000000.tar", "")
    assert lost["reason"].startswith("can't hold out 5 clips of validation: ")
    assert "503" in lost["reason"]
    assert damaged["reason"].startswith("can't hold out 3 clips of test: the shard has 0 clips that can be read, not")
    first, second = held_out.warnings
    assert first.startswith("5 of 20 clips of the validation split can't be read and so not be held out of training")
    assert "banks, the first in validation-000001.tar: " in first
    assert second.startswith("3 of 3 clips of the test split")


def test_a_clip_whose_key_alone_can_be_read_is_held_out_by_that(splits: dict[str, ShardList]) -> None:
    with tarfile.open(splits["test"].paths[0], "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("clip-005.flac"))
    held_out = HeldOut.of({"test": splits["test"]})
    assert held_out.keys == {"clip-005": "test"}
    doubled, missing = held_out.unread
    assert doubled == {
        "shard": "test-000000.tar",
        "key": "clip-005",
        "reason": "can't hold out this clip of test by more than its key: the key occurs twice in the shard",
    }
    assert missing["reason"].startswith("can't hold out 2 clips of test: ")
    assert "3 of 3 clips of the test split" in held_out.warnings[0]


def test_an_audit_names_repeated_keys_and_leaks_before_a_run(
    splits: dict[str, ShardList], tmp_path: Path, make_clip: MakeClip
) -> None:
    write_shards(map(make_clip, range(38, 50)), tmp_path / "more", "train", clips_per_shard=5)
    found = audit(ShardList.load([tmp_path / "train", tmp_path / "more"]), HeldOut.of({"test": splits["test"]}))
    assert [(Path(record["shard"]).parent.name, record["key"]) for record in found] == [
        ("train", "clip-005"),
        ("train", "clip-006"),
        ("train", "clip-007"),
        ("more", "clip-038"),
        ("more", "clip-039"),
    ]
    assert found[-1]["reason"] == "the key is that of an earlier clip"
    assert audit(splits["validation"], HeldOut.of({"test": splits["test"]})) == []


@pytest.mark.parametrize("same", ["A dog barks.", " a  DOG,\tbarks!", "\uff21 dog barks", "a dog barks"])
def test_captions_are_the_same_if_their_words_are(same: str) -> None:
    assert words(same) == words("a dog barks")
    assert words(same) not in (words("a dog barked"), words("dogs bark"), words("dog barks a"))


def test_captions_without_words_are_told_apart() -> None:
    assert len({words(caption) for caption in ("...", "!", "\U0001f415", "")}) == 4


def test_a_caption_alone_is_refused_but_not_beside_a_sound_of_its_own(
    splits: dict[str, ShardList], tmp_path: Path, make_clip: MakeClip
) -> None:
    held_out = HeldOut.of(splits)
    with pytest.raises(BadSample, match=r"^held out: the same caption is in test as other$"):
        held_out.refuse_caption("Another caption!")
    held_out.refuse_caption("another captioned")
    write_shards([Clip("new", make_clip(70).audio, 8000, ("another caption",))], tmp_path / "new", "train")
    assert audit(ShardList.load(tmp_path / "new"), held_out) == []
    loader = EvalLoader(
        ShardList.load(tmp_path / "new"),
        held_out=held_out,
        rank=0,
        world_size=1,
        batch_size=2,
        sample_rate=8000,
        clip_seconds=0.05,
    )
    (batch,) = loader.batches()
    assert (batch.keys, batch.captions) == (["new"], [["another caption"]])
