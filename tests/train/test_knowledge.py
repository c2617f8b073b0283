"""A worker's link to the bank: when it gives up, and how a checkpoint comes back in another number of shards."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import ray
import torch

from ask_dist import cluster, config
from ask_dist.bank.prototypes import unit_rows
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.train import checkpoint
from ask_dist.train.knowledge import KnowledgeSource, load_actors, save_bank

pytestmark = pytest.mark.ray
DIM, ROWS = 8, 120


def run_config(**bank) -> Config:
    return config.parse(
        {
            "name": "link",
            "data": {"train": "unread"},
            "model": {"embedding_dim": DIM},
            "optimization": {"deterministic": True},
            "knowledge": {"start": 0.0, "neighbours": 4},
            "bank": bank,
            "refine": {"strategy": "none"},
        }
    )


@pytest.fixture
def started(local_ray):
    """Links to banks of their own."""
    running = []

    def start(**bank) -> tuple[KnowledgeSource, cluster.Actors]:
        run = run_config(**bank)
        running.append(cluster.start_actors(run, steps_per_epoch=10))
        return KnowledgeSource(run, running[-1], torch.device("cpu")), running[-1]

    yield start
    for actors in running:
        cluster.stop_actors(actors)


def answer(link: KnowledgeSource, ids: torch.Tensor) -> dict[int, list[float]]:
    link.prefetch(ids, 0.5)
    rows = link.collect()
    return {int(row): audio.tolist() for row, audio in zip(rows.ids, rows.audio, strict=True)}


def test_a_checkpoint_goes_on_in_any_number_of_shards(started, tmp_path):
    rng = np.random.default_rng(3)
    ids = torch.arange(ROWS)
    audio, text = (torch.from_numpy(unit_rows(rng.normal(size=(ROWS, DIM)))) for _ in range(2))
    link, actors = started()
    link.upsert(ids, audio, text, torch.ones(ROWS), 3)
    expected = answer(link, ids[:9])
    for shards in (3, 2, 2):
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        banks = {name: partial(save_bank, primary) for name, primary in actors.primaries.items()}
        checkpoint.save(folder, engine={}, arrays={}, banks=banks, global_step=3, samples_seen=9, lineage="same")
        link, actors = started(shards=shards)
        load_actors(actors, folder)
        assert answer(link, ids[:9]) == expected
        assert link.last_metrics()["bank/rows"] == ROWS
        stored = link.stored_rows(np.array([5, ROWS + 1, 2]))
        assert stored.ids.tolist() == [2, 5]
        np.testing.assert_array_equal(stored.text, text[[2, 5]].half().float())
    assert sorted(path.name for path in folder.glob("bank*")) == ["bank-0", "bank-1"]


@pytest.mark.parametrize("shards", [1, 2])
def test_rows_that_are_put_are_there_or_it_is_told(started, shards):
    rows = unit_rows(np.random.default_rng(4).normal(size=(ROWS, DIM)))
    link, _ = started(shards=shards, capacity=ROWS)
    link.put(np.arange(ROWS), rows, rows, 0)
    assert link.last_metrics()["bank/rows"] == ROWS
    with pytest.raises(InputError, match=r"rows exceed the bank's capacity of .*: raise bank\.capacity"):
        link.put(np.arange(ROWS, 3 * ROWS), np.tile(rows, (2, 1)), np.tile(rows, (2, 1)), 0)


def test_a_deterministic_step_asks_for_itself_and_ends_with_its_bank(started):
    rows = torch.from_numpy(unit_rows(np.random.default_rng(5).normal(size=(ROWS, DIM))))
    link, actors = started()
    ids = torch.arange(ROWS)
    link.upsert(ids, rows, rows, torch.ones(ROWS), 0)
    for step in (0, 1):  # the first one too, as after a resume
        asked, following = ids[4 * step : 4 * step + 4], ids[4 * step + 4 : 4 * step + 8]
        neighbours = link.exchange(asked, following, step, total_steps=10)
        torch.testing.assert_close(neighbours.own_audio, rows[asked].float(), atol=1e-3, rtol=0)
    ray.kill(actors.bank[0][0], no_restart=False)  # Ray might restart it, empty
    with pytest.raises(RuntimeError, match="the bank did not answer"):  # once it is dead
        any((link.exchange(ids[:4], ids[4:8], 2, total_steps=10).own_age < 0).any() for _ in itertools.count())


def test_a_bank_that_answers_nothing_ends_the_run(started):
    link, actors = started(shards=2, max_missed=3)
    cluster.stop_actors(actors)
    for _ in range(2):
        link.prefetch(torch.arange(4), 0.5)
        assert link.collect() is None
    link.prefetch(torch.arange(4), 0.5)
    with pytest.raises(InputError, match=r"3 of the bank's answers in a row came late or failed, bank\.max_missed"):
        link.collect()
