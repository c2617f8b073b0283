"""What each worker encodes of a corpus that is encoded again: together all of it, whatever can't be used aside."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from ask_dist import config as configuration
from ask_dist.data.leaks import HeldOut, words
from ask_dist.data.pack import write_shards
from ask_dist.data.quarantine import BadSamples
from ask_dist.data.shards import Clip, ShardList, stable_id
from ask_dist.errors import InputError
from ask_dist.evaluate.encode import caption_rows, encode, paired_rows
from ask_dist.models.saved import load_model
from ask_dist.train import reencode
from ask_dist.train.loop import load_shards
from ask_dist.train.start import check_start
from tests.finished_run import noise_corpus, untrained_run

CLIPS = 23


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_corpus(tmp_path_factory.mktemp("corpus") / "train", CLIPS)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("runs") / "noise", corpus)


def by_id(ids: np.ndarray, audio: np.ndarray, text: np.ndarray) -> dict[int, np.ndarray]:
    assert len(set(ids.tolist())) == len(ids)
    return dict(zip(ids.tolist(), np.concatenate([audio, text], axis=1), strict=True))


def encoded(
    corpus: ShardList | list[str], run: Path, ranks: int, held_out: HeldOut, bad: BadSamples | None = None
) -> dict[int, np.ndarray]:
    """The rows of all ranks by id, after each is seen to have as many parts."""
    config, model = load_model(run)
    bad = bad or BadSamples()
    shares = [list(reencode.share_of(corpus, model, config, rank, ranks, held_out, bad)) for rank in range(ranks)]
    assert len(set(map(len, shares))) == 1
    assert all(len(ids) <= reencode.PART for share in shares for ids, _, _ in share)
    return by_id(
        *(np.concatenate(column) for column in zip(*(part for share in shares for part in share), strict=True))
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_passes_that_no_question_to_the_bank_meets_are_left_out(deterministic):
    for total, every, gate in itertools.product((7, 20, 50), (1, 3, 5, 20), (0.0, 0.1, 0.12, 0.25, 0.5, 1.0)):
        config = configuration.parse(
            {
                "name": "schedule",
                "data": {"train": "unread"},
                "knowledge": {"start": 0.6, "reliability": {"start": gate}},
                "refine": {"strategy": "reencode"},
            }
        )
        due = [step for step in range(1, total + 1) if reencode.is_due(config, step, every, total)]
        first = config.knowledge.asked_from
        # In the step after so many: for that one, or for the one that follows, see KnowledgeSource.exchange.
        asked = [step for step in range(total) if (step + (not deterministic)) / total >= first]
        met = {step // every * every for step in asked} - {0}
        assert met <= set(due)
        assert len([step for step in due if asked and step + every <= asked[0]]) <= deterministic
        assert [step for step in due if step % every] == []
        assert total % every or total in due  # the bank that a run leaves is as its last weights are


def test_other_strategies_encode_nothing_again():
    config = configuration.parse({"name": "schedule", "data": {"train": "unread"}})
    assert not any(reencode.is_due(config, step, 1, 9) for step in range(1, 10))


@pytest.mark.parametrize("ranks", [1, 3])
def test_workers_encode_every_clip_once(corpus, run, ranks, monkeypatch):
    monkeypatch.setattr(reencode, "PART", 5)
    shards = ShardList.load(corpus)
    config, model = load_model(run)
    wanted = by_id(*paired_rows(encode(model, shards, config, 0, 1)))
    found = encoded(shards, run, ranks, HeldOut(keys={"clip-04": "test"}))
    assert wanted.keys() - found.keys() == {stable_id("clip-04")}
    for row, values in found.items():
        np.testing.assert_allclose(values, wanted[row], atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_sounds_like_a_held_out_clip_stays_out(run, tmp_path, ranks):
    rng = np.random.default_rng(3)
    sounds = [rng.normal(scale=0.1, size=32000).astype(np.float32) for _ in range(5)]
    write_shards(
        [Clip(f"new-{n}", audio, 16000, ("a noise",)) for n, audio in enumerate(sounds)], tmp_path / "new", "train"
    )
    write_shards([Clip("tested", -0.5 * sounds[3][:-777], 16000, ("a noise",))], tmp_path / "test", "test")
    held_out = HeldOut.of({"test": ShardList.load(tmp_path / "test")}, fingerprints=True)
    bad = BadSamples()
    found = encoded(ShardList.load(tmp_path / "new"), run, ranks, held_out, bad)
    assert found.keys() == {stable_id(f"new-{number}") for number in (0, 1, 2, 4)}
    assert [(record["key"], record["reason"]) for record in bad.records] == [
        ("new-3", "held out: it sounds like test as tested")
    ]
    assert (bad.delivered, bad.count) == (0, 0)  # they are none of the samples that training met


def test_captions_that_are_held_out_stay_out(run, monkeypatch):
    monkeypatch.setattr(reencode, "PART", 5)
    captions = [f"noise number {number}" for number in range(CLIPS)]
    config, model = load_model(run)
    wanted = by_id(*caption_rows(model, captions, config.model.embedding_dim))
    found = encoded(captions, run, 2, HeldOut(captions={words("Noise number 7!"): "test as x"}))
    assert wanted.keys() - found.keys() == {stable_id("caption:noise number 7")}
    for row, values in found.items():
        np.testing.assert_allclose(values, wanted[row], atol=1e-5)


def test_a_damaged_part_costs_its_own_rows_and_is_named(corpus, run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reencode, "PART", 5)
    hurt = shutil.copytree(corpus, tmp_path / "hurt")
    (shard, *_) = sorted(hurt.glob("*.tar"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    found = encoded(ShardList.load(hurt), run, 1, HeldOut())
    assert found.keys() == {stable_id(f"clip-{number:02d}") for number in range(10, CLIPS)}
    assert all("their rows stay as they are" in said for said in caplog.messages)
    assert len(caplog.messages) == 3  # parts that have some of it


def test_a_corpus_that_is_not_there_is_told_before_the_run(run, tmp_path):
    given = ["refine.strategy=reencode", f"refine.corpus={tmp_path / 'none'}"]
    config = configuration.load(run / "config.yaml", given)
    with pytest.raises(InputError, match="none"):
        check_start(config, load_shards(config))
