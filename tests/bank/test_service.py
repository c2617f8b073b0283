"""Shards and read replicas as real actors, behind the client that a worker has."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid

import numpy as np
import pytest
import ray

from ask_dist.bank.actor import BankActor, RemoteBankActor
from ask_dist.bank.client import BankClient
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit
from ask_dist.bank.prototypes import unit_rows
from ask_dist.bank.service import BankService
from ask_dist.bank.shard import CHANGES

pytestmark = pytest.mark.ray
DIM, ROWS = 16, 300
MANY = CHANGES + 5000  # more than a replica is sent at a time
SETTINGS = {"dim": DIM, "capacity": ROWS, "dtype": "float16"}


@pytest.fixture
def rows(rng):
    return np.arange(ROWS), *(unit_rows(rng.normal(size=(ROWS, DIM))).astype(np.float16) for _ in range(2))


@pytest.fixture
def start_shards(local_ray):
    started = []

    def start(shards: int, replicas: int = 1, **settings) -> list[list]:
        handles, settings = [], SETTINGS | settings
        for _ in range(shards):
            name = f"primary-{uuid.uuid4().hex}"
            actors = [RemoteBankActor.options(num_cpus=0, name=name).remote(neighbours=4, **settings)]
            actors += [
                RemoteBankActor.options(num_cpus=0).remote(neighbours=4, primary=name, **settings)
                for _ in range(replicas - 1)
            ]
            handles.append(actors)
            started.extend(actors)
        return handles

    yield start
    for actor in started:
        ray.kill(actor)


def wait_for_rows(actors, rows: int) -> None:
    """Polls, also while an actor is being restarted; the test's own timeout ends a wait in vain."""
    held = 0
    while held < rows:
        time.sleep(0.02)
        with contextlib.suppress(ray.exceptions.ActorUnavailableError):
            held = sum(ray.get([actor.ping.remote() for actor in actors]))


def test_a_client_of_shards_gets_one_banks_answer(start_shards, rows):
    shards, bank = start_shards(3), KnowledgeBank(**SETTINGS)
    client = BankClient(BankService(shards), deterministic=True)
    client.upsert(*rows, np.linspace(0, 1, ROWS, dtype=np.float32), 2)
    bank.upsert(*rows, np.linspace(0, 1, ROWS, dtype=np.float32), 2)
    for step in range(3, 8):
        ids = np.array([step, 7 * step, step, ROWS + step])
        client.prefetch(ids)
        answer, expected = client.collect(), bank.search_ids(ids, 4)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(answer, name), value, name)  # this bank's row order is that of ids
        part = [values[step : 2 * step] for values in rows]
        client.upsert(*part, None, step)
        bank.upsert(*part, None, step)
    assert client.metrics() == {"bank/late_share": 0.0, "bank/failed": 0.0, "bank/dropped_upserts": 0.0}


def test_a_shard_that_hangs_makes_answers_late_and_holds_up_nobody(start_shards, rows):
    shards = start_shards(2)
    client = BankClient(BankService(shards), max_in_flight=2)
    client.upsert(*rows, None, 0)
    wait_for_rows([primary for (primary,) in shards], ROWS)
    process = ray.get(shards[1][0].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGSTOP)
    try:
        for step in range(1, 6):
            client.upsert(*rows, None, step)
            client.prefetch(rows[0][:9])
            assert client.collect() is None
        newest = 0
        while newest < 1:  # the other shard is written all the same
            newest = ray.get(shards[0][0].snapshot.remote()).newest_step
    finally:
        os.kill(process, signal.SIGCONT)
    assert client.metrics()["bank/late_share"] == 1
    assert client.metrics()["bank/dropped_upserts"] >= 1
    knowledge = None
    while knowledge is None:
        client.prefetch(rows[0][:9])
        time.sleep(0.02)
        knowledge = client.collect()
    assert knowledge.rows == ROWS
    assert client.metrics()["bank/failed"] == 0


def test_readers_turn_from_a_replica_that_died_and_it_fills_itself_again(start_shards, rows):
    (actors,) = start_shards(1, replicas=2)
    readers = [BankClient(BankService([actors], reader), deterministic=True) for reader in (0, 1)]
    readers[0].upsert(*(part[:200] for part in rows), None, 1)
    wait_for_rows(actors, 2 * 200)
    readers[0].upsert(*(part[200:] for part in rows), None, 2)
    wait_for_rows(actors, 2 * ROWS)
    for reader in readers:
        reader.prefetch(rows[0][:5])
    first, second = (reader.collect() for reader in readers)
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(second, name), value, name)
    assert [ray.get(actor.metrics.remote())["bank/searches"] for actor in actors] == [1, 1]

    ray.kill(actors[1], no_restart=False)
    answers = []
    while len(answers) < 3 or answers[-1] is None:
        readers[1].prefetch(rows[0][:5])
        answers.append(readers[1].collect())
    assert answers[-1].rows == ROWS  # by the primary, or by the replica filled again
    wait_for_rows(actors[1:], ROWS)

    ray.get(actors[0].load.remote([]))  # the bank begins anew: replicas drop what they had
    while ray.get(actors[1].ping.remote()):
        time.sleep(0.02)


@pytest.fixture
def many(rng):
    audio, text = (unit_rows(rng.normal(size=(MANY, 2))).astype(np.float16) for _ in range(2))
    return np.arange(MANY), audio, text


def test_a_replica_shows_a_commit_whole_or_not_at_all(start_shards, many):
    ((primary, replica),) = start_shards(1, replicas=2, dim=2, capacity=MANY)
    ray.get(primary.upsert.remote(*many, None, 100))
    wait_for_rows([replica], MANY)
    asked, shown = np.arange(0, MANY, MANY // 50), {100}
    for frame in range(10, 16):
        seen = ray.get(primary.snapshot.remote())
        ray.get(primary.commit.remote(Commit(seen.ids, seen.audio, seen.text, seen.version, frame, life=seen.life)))
        while 100 - frame not in shown:
            knowledge = ray.get(replica.search_ids.remote(asked))
            (age,) = set(knowledge.own_age.tolist())
            shown.add(age)
    assert ray.get(replica.metrics.remote())["bank/generation"] == 6


def test_a_replica_takes_the_place_of_a_restarted_primary_until_it_has_all_of_the_new_one(
    start_shards, many, tmp_path, caplog
):
    ((primary,),) = start_shards(1, dim=2, capacity=MANY)
    name = ray.get(primary.__ray_call__.remote(lambda _: ray.get_runtime_context().get_actor_name()))
    replica, held = BankActor(neighbours=4, primary=name, dim=2, capacity=MANY), set()
    ray.get(primary.upsert.remote(*many, None, 1))
    ray.get(primary.save.remote(str(tmp_path)))
    while not held >= {0, MANY}:
        held.add(replica.search_ids(many[0][:5]).rows)
    assert held == {0, MANY}
    ray.get(primary.load.remote([str(tmp_path)]))
    ray.get(primary.upsert.remote(*(part[:5] for part in many), None, 2))
    while replica.search_ids(many[0][:5]).newest_step < 2:
        held.add(replica.search_ids(many[0][:5]).rows)
    assert held == {0, MANY}
    assert caplog.messages == []
    ray.get(primary.load.remote([]))
    while replica.ping():
        time.sleep(0.02)
    assert f"the primary began anew with 0 rows: the {MANY} that were held go" in caplog.messages


def test_a_dead_shards_replica_answers_for_it(start_shards, rows):
    shards = start_shards(2, replicas=2)
    client = BankClient(BankService(shards), deterministic=True)
    client.upsert(*rows, None, 1)
    wait_for_rows([replica for _, replica in shards], ROWS)
    client.prefetch(rows[0][:9])
    expected = client.collect()
    ray.kill(shards[1][0])
    answers = [expected]
    while None not in answers or answers[-1] is None:
        client.prefetch(rows[0][:9])
        answers.append(client.collect())
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(answers[-1], name), value, name)
    assert client.metrics()["bank/failed"] == answers.count(None)
