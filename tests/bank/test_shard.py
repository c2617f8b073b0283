"""A bank in shards answers as one bank does, follows itself, and can be split anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ask_dist.bank import shard as shard_module
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit, Knowledge
from ask_dist.bank.prototypes import unit_rows
from ask_dist.bank.shard import KnowledgeShard, Mark, capacity_of, joined, shard_of, shard_state, whole_metrics

DIM, IDS = 8, 60


def written(rng: np.random.Generator, banks: list[KnowledgeBank], steps: int) -> None:
    """The same random upserts, to one bank or split over shards."""
    for step in range(steps):
        ids = rng.choice(IDS, int(rng.integers(1, 12)), replace=False) * 7 - 3
        audio, text = unit_rows(rng.normal(size=(len(ids), DIM))), unit_rows(rng.normal(size=(len(ids), DIM)))
        trust = rng.uniform(-0.2, 1.0, len(ids)).astype(np.float32)
        home = shard_of(ids, len(banks))
        for shard, bank in enumerate(banks):
            here = home == shard
            if here.any():
                bank.upsert(ids[here], audio[here], text[here], trust[here], step)


def searched(shards: list[KnowledgeShard], ids: np.ndarray, k: int) -> Knowledge:
    """What the service asks of the actors."""
    asked, order = np.unique(ids, return_inverse=True)
    home = shard_of(asked, len(shards))
    own = [shard.own_rows(asked[home == number]) for number, shard in enumerate(shards)]
    found = [shard.nearest(asked, k, *own) for shard in shards]
    return joined(asked[order], own, [shard.chosen(number, *found) for number, shard in enumerate(shards)])


def assert_equal_but_for_order(answer: Knowledge, expected: Knowledge) -> None:
    order = np.argsort(expected.ids)
    for name in ("ids", "audio", "text", "reliability", "age"):
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name)[order], name)
        assert getattr(answer, name).dtype == getattr(expected, name).dtype
    for name in ("own_audio", "own_text", "own_age", "own_reliability", "generation", "rows", "newest_step"):
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name), name)


@given(
    seed=st.integers(0, 2**32 - 1),
    shards=st.integers(1, 4),
    steps=st.integers(0, 12),
    k=st.integers(1, 20),
    settings=st.sampled_from(
        [{"dtype": "float16"}, {"dtype": "float32"}, {"minimum_reliability": 0.4}, {"max_age": 3, "dtype": "float32"}]
    ),
)
def test_shards_answer_as_one_bank(seed, shards, steps, k, settings):
    one = KnowledgeBank(DIM, IDS, **settings)
    split = [KnowledgeShard(DIM, IDS, **settings) for _ in range(shards)]
    written(np.random.default_rng(seed), [one], steps)
    written(np.random.default_rng(seed), split, steps)
    ids = np.random.default_rng([seed, 1]).choice(IDS, 9) * 7 - 3  # some unknown, some twice
    assert_equal_but_for_order(searched(split, ids, k), one.search_ids(ids, k))


def test_corrected_rows_are_searched_with_as_they_are_stored(rng):
    one, split = KnowledgeBank(DIM, IDS, "float32"), [KnowledgeShard(DIM, IDS, "float32") for _ in range(3)]
    written(np.random.default_rng(3), [one], 10)
    written(np.random.default_rng(3), split, 10)
    moved = rng.normal(size=(2, IDS * 7, DIM)).astype(np.float32)
    for bank in (one, *split):
        seen = bank.snapshot()
        bank.commit(Commit(seen.ids, *moved[:, seen.ids], seen.version, 9))
    ids = np.arange(20) * 7 - 3
    assert_equal_but_for_order(searched(split, ids, 5), one.search_ids(ids, 5))


def test_ids_spread_evenly_and_a_shard_has_room_for_its_part(rng):
    for ids in (np.arange(100_000), rng.integers(-(2**63), 2**63 - 1, 100_000)):
        counts = np.bincount(shard_of(ids, 7), minlength=7)
        assert counts.max() <= capacity_of(100_000, 7) < 1.1 * 100_000 / 7
    assert capacity_of(100, 1) == 100


def test_a_replica_follows_a_few_rows_at_a_time(rng, monkeypatch):
    monkeypatch.setattr(shard_module, "CHANGES", 16)
    primary, replica = KnowledgeShard(DIM, IDS), KnowledgeShard(DIM, IDS)
    mark, sent = Mark(), 0
    for _ in range(5):
        written(rng, [primary], 4)
        seen = primary.snapshot()
        primary.commit(Commit(seen.ids[::3], *rng.normal(size=(2, len(seen.ids[::3]), DIM)), seen.version[::3], 3))
        parts = []
        while not parts or parts[-1].more:
            changes = primary.changes(mark)
            assert changes.restart == (mark == Mark())
            assert len(changes.rows["ids"]) <= 16
            parts.append(changes)
            mark, sent = changes.mark, sent + len(changes.rows["ids"])
        replica.follow(parts)
        ids = np.arange(IDS) * 7 - 3
        expected, answer = primary.search_ids(ids[:7], 4), replica.search_ids(ids[:7], 4)
        order = np.argsort(answer.ids)
        for name in ("ids", "audio", "age", "reliability"):
            values = getattr(expected, name)[np.argsort(expected.ids)]
            np.testing.assert_array_equal(getattr(answer, name)[order], values)
        assert (answer.generation, answer.newest_step) == (expected.generation, expected.newest_step)
    assert sent < 5 * len(primary)  # not the whole bank each time
    assert not len(primary.changes(mark).rows["ids"])
    assert primary.changes(Mark("another life", mark.write)).restart


@pytest.mark.parametrize("ways", [(1, 3, 2), (2, 2)])
def test_states_are_split_anew_by_their_rows_ids(ways, rng):
    first = KnowledgeShard(DIM, IDS)
    written(rng, [first], 12)
    seen = first.snapshot()
    first.commit(Commit.of_prototypes([(seen.audio[:4], seen.text[:4])], seen))
    expected = first.search_ids(np.arange(9) * 7 - 3, 5)
    states = [first.state()]
    for count in ways:
        states = [shard_state(states, number, count) for number in range(count)]
        shards = [KnowledgeShard.from_state(state, dim=DIM, capacity=IDS) for state in states]
        assert [len(shard) for shard in shards] == np.bincount(shard_of(seen.ids, count), minlength=count).tolist()
        assert_equal_but_for_order(searched(shards, np.arange(9) * 7 - 3, 5), expected)
        assert shards[0].prototypes.generation == 1
        states = [shard.state() for shard in shards]
    total = whole_metrics([[shard.metrics()] for shard in shards])
    assert total["bank/upserts"] == first.metrics()["bank/upserts"]
    assert total["bank/staleness"] == pytest.approx(first.metrics()["bank/staleness"])
    assert shard_state([{}, {}], 0, 2) == {}


def test_metrics_of_shards_and_replicas_are_one_banks():
    said = {"bank/rows": 3.0, "bank/staleness": 2.0, "bank/generation": 4.0, "bank/searches": 5.0}
    said |= {"bank/upserts": 3.0, "bank/rejected": 1.0, "bank/inverted_rows": 0.0, "bank/recall_audio": 1.0}
    other = said | {"bank/rows": 1.0, "bank/staleness": 6.0, "bank/generation": 3.0, "bank/recall_audio": 0.9}
    said |= {"bank/given": 30.0, "bank/external_share": 0.5}
    other |= {"bank/given": 0.0, "bank/external_share": 0.0}
    replica = {"bank/searches": 2.0, "bank/given": 10.0, "bank/external_share": 0.1}
    total = whole_metrics([[said, replica], [other, {}]])
    assert (total["bank/rows"], total["bank/staleness"], total["bank/recall_audio"]) == (4.0, 3.0, 0.9)
    assert (total["bank/searches"], total["bank/generation"]) == (7.0, 3.0)
    assert (total["bank/given"], total["bank/external_share"]) == (40.0, pytest.approx(0.4))
    assert whole_metrics([[said], [{}]]) == {}
