"""The bank actor and its client on a real Ray."""

from __future__ import annotations

import gc
import os
import signal
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray

from ask_dist.bank import rows as bank_rows
from ask_dist.bank import snapshot, store
from ask_dist.bank.actor import BankActor, RemoteBankActor
from ask_dist.bank.client import BankClient
from ask_dist.bank.durable import recover
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit, Knowledge
from ask_dist.bank.prototypes import unit_rows
from ask_dist.errors import DiskError, InputError
from tests.mounts import fill, mounted

pytestmark = pytest.mark.ray
DIM, ROWS = 16, 300
SETTINGS = {"dim": DIM, "capacity": ROWS, "dtype": "float16"}


@pytest.fixture
def rows(rng):
    return np.arange(ROWS), unit_rows(rng.normal(size=(ROWS, DIM))), unit_rows(rng.normal(size=(ROWS, DIM)))


@pytest.fixture
def start_actor(local_ray):
    started = []

    def start(**settings):
        actor = RemoteBankActor.options(num_cpus=0).remote(neighbours=4, **{**SETTINGS, **settings})
        started.append(actor)
        return actor

    yield start
    for actor in started:
        ray.kill(actor)


def wait_for_rows(actor, rows: int) -> None:
    while ray.get(actor.ping.remote()) < rows:
        time.sleep(0.01)


def answer_in_time(client: BankClient, ids: np.ndarray) -> Knowledge:
    """Steps of a training loop, until the bank was quick enough."""
    while True:
        client.prefetch(ids)
        time.sleep(0.02)
        knowledge = client.collect()
        if knowledge is not None:
            return knowledge


def test_the_actor_answers_as_the_bank_does(start_actor, rows):
    actor, bank = start_actor(), KnowledgeBank(**SETTINGS)
    assert ray.get(actor.upsert.remote(*rows, None, 3)) == bank.upsert(*rows, None, 3)
    answer, expected = ray.get(actor.search_ids.remote(rows[0][:7])), bank.search_ids(rows[0][:7], 4)
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(answer, name), value)
    here, there = bank.search(rows[1][:2], 3, "text"), ray.get(actor.search.remote(rows[1][:2], 3, "text"))
    np.testing.assert_array_equal(there[1], here[1])
    seen = ray.get(actor.snapshot.remote())
    assert ray.get(actor.commit.remote(Commit.of_prototypes([(rows[1], rows[2])], seen))).generation == 1
    assert ray.get(actor.prototypes.remote()).generation == 1
    assert ray.get(actor.metrics.remote())["bank/rows"] == ROWS
    assert ray.get(actor.ping.remote()) == ROWS


def test_an_answer_is_in_float16_and_is_read_where_the_object_store_has_it(start_actor, rng):
    dim, asked = 256, np.arange(ROWS // 2)
    actor, halves = start_actor(dim=dim, dtype="float32"), unit_rows(rng.normal(size=(2 * ROWS, dim)))
    ray.get(actor.upsert.remote(np.arange(ROWS), halves[:ROWS], halves[ROWS:], None, 0))
    reference = actor.search_ids.remote(asked)
    once, again = ray.get(reference), ray.get(reference)
    for name in ("audio", "text", "own_audio", "own_text"):
        values, same = getattr(once, name), getattr(again, name)
        assert values.dtype == np.float16
        assert values.ctypes.data == same.ctypes.data  # a copy would lie somewhere else
        assert not values.flags.writeable
    stored = ray.get(actor.snapshot.remote())
    np.testing.assert_array_equal(once.audio, stored.audio[once.ids])
    np.testing.assert_array_equal(once.own_text, halves[ROWS : ROWS + len(asked)].astype(np.float16))


def test_the_actor_trains_its_inverted_files_by_itself(start_actor, rows):
    actor = start_actor(index="ivf_flat", inverted_from=100, maintenance_seconds=0.05)
    ray.get(actor.upsert.remote(*rows, None, 3))
    deadline = time.monotonic() + 30
    while not ray.get(actor.metrics.remote())["bank/inverted_rows"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = ray.get(actor.search.remote(rows[1][:9], 1, "audio"))[1]
    np.testing.assert_array_equal(found[:, 0], rows[0][:9])
    ray.get(actor.load.remote([]))  # an emptied bank begins with exact search again
    assert ray.get(actor.metrics.remote())["bank/inverted_rows"] == 0


def test_a_bank_process_imports_no_torch(local_ray):
    # An environment of its own, so that no process is taken that another test's task ran in.
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"OF_ITS_OWN": "1"}})
    def loaded_modules() -> set[str]:
        import sys

        import ask_dist.bank.actor  # noqa: F401

        return {name for name in ("faiss", "torch") if name in sys.modules}

    assert ray.get(loaded_modules.remote()) == {"faiss"}


def test_a_saved_bank_comes_back(start_actor, rows, tmp_path):
    first = start_actor()
    ray.get(first.upsert.remote(*rows, None, 3))
    folder = str(tmp_path)
    digest = ray.get(first.save.remote(folder))
    second = start_actor()
    ray.get(second.load.remote([folder]))
    assert ray.get(second.ping.remote()) == ROWS
    assert ray.get(second.save.remote(folder)) == digest
    assert len(store.snapshots(tmp_path)) == 1
    with pytest.raises(InputError):
        ray.get(start_actor(dim=8).load.remote([folder]))


@pytest.fixture(params=[False, True], ids=["in memory", "durable"])
def make_actor(request, tmp_path):
    """Actors in this process, without Ray."""
    made = []

    def make(**settings) -> BankActor:
        kept = str(tmp_path / f"kept-{len(made)}") if request.param else None
        made.append(BankActor(neighbours=4, durable_path=kept, **{**SETTINGS, **settings}))
        return made[-1]

    yield make
    for actor in made:
        if actor._durable:
            actor._durable.close()


def test_a_loaded_bank_is_read_into_the_memory_of_the_old_one(make_actor, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "MANIFEST_BYTES", 2**16)  # a buffer of that size is made at once
    monkeypatch.setattr(snapshot, "PART_BYTES", 2**16)
    monkeypatch.setattr(bank_rows, "CHUNK_ROWS", 1000)
    count, dim = 10_000, 500
    halves = rng.normal(size=(2, count, dim)).astype(np.float16)
    tracemalloc.start()
    try:
        actor = make_actor(dim=dim, capacity=count)
        actor.upsert(np.arange(count), *halves, None, 3)
        actor.save(str(tmp_path / "saved"))
        size = store.snapshots(tmp_path / "saved")[0].with_suffix(".safetensors").stat().st_size
        assert size > 20e6
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] > size
        tracemalloc.reset_peak()
        actor.load([str(tmp_path / "saved")])
        assert tracemalloc.get_traced_memory()[1] < 1.4 * size
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(actor.snapshot().audio, halves[0])


def test_callers_are_told_of_an_empty_bank_while_another_is_loaded(make_actor, rows, tmp_path):
    actor = make_actor()
    actor.upsert(*rows, None, 3)
    actor.save(str(tmp_path / "saved"))
    actor.upsert(*(part[:9] for part in rows), None, 7)
    in_progress = actor._bank.search_ids  # a call that has not ended has the old bank
    with ThreadPoolExecutor(1) as lane:
        loading = lane.submit(actor.load, [str(tmp_path / "saved")])
        deadline = time.monotonic() + 30
        while actor.ping():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert actor.metrics()["bank/rows"] == 0
        answer = actor.search_ids(rows[0][:5])
        assert (answer.rows, len(answer.ids), answer.own_age.tolist()) == (0, 0, [-1] * 5)
        assert actor.prototypes() is None
        assert not loading.done()
        del in_progress
        loading.result()
    assert actor.ping() == ROWS
    assert actor.metrics()["bank/rows"] == ROWS
    np.testing.assert_array_equal(actor.snapshot().step, 3)
    if actor._durable:
        assert actor.metrics()["bank/durable"] == 1
        kept = recover(tmp_path / "kept-0", actor._made).bank
        np.testing.assert_array_equal(kept.snapshot().step, 3)


def test_a_snapshot_that_is_damaged_or_does_not_fit_leaves_the_bank_as_it_was(make_actor, rows, rng, tmp_path):
    actor, other = make_actor(), KnowledgeBank(**{**SETTINGS, "capacity": ROWS + 1})
    actor.upsert(*rows, None, 3)
    before = actor.snapshot()
    damaged = store.save(tmp_path / "damaged", other.state()).with_suffix(".safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    store.save(tmp_path / "narrow", KnowledgeBank(dim=8, capacity=9).state())
    other.upsert(np.arange(ROWS + 1), *rng.normal(size=(2, ROWS + 1, DIM)), None, 0)
    store.save(tmp_path / "long", other.state())
    lines = {
        "damaged": "does not match its checksum",
        "narrow": "0 rows of width 8, the bank takes 300 of width 16",
        "long": "301 rows of width 16, the bank takes 300 of width 16",
    }
    for name, line in lines.items():
        with pytest.raises(InputError, match=line):
            actor.load([str(tmp_path / name)])
        for part, value in vars(before).items():
            np.testing.assert_array_equal(getattr(actor.snapshot(), part), value)
    if actor._durable:
        assert len(recover(tmp_path / "kept-0", actor._made).bank) == ROWS


def test_a_folder_that_can_t_be_written_is_told_in_a_line(start_actor, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk, pytest.raises(DiskError, match="Read-only file system"):
        ray.get(start_actor().save.remote(str(disk / "bank")))


def process_of(actor) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def killed(actor) -> None:
    """SIGKILL of the actor's process, and waits for Ray to restart it."""
    process = process_of(actor)
    os.kill(process, signal.SIGKILL)
    while True:
        try:
            assert process_of(actor) != process
            return
        except ray.exceptions.RayActorError:
            time.sleep(0.05)


def test_a_durable_bank_that_is_killed_comes_back_with_all_that_it_took(start_actor, rows, tmp_path):
    actor, bank = start_actor(durable_path=str(tmp_path / "bank")), KnowledgeBank(**SETTINGS)
    assert ray.get(actor.upsert.remote(*rows, None, 3)) == bank.upsert(*rows, None, 3)
    killed(actor)
    digest = ray.get(actor.save.remote(str(tmp_path / "checkpoint")))
    assert snapshot.read_manifest(store.snapshots(tmp_path / "bank")[0]).digest == digest
    some = (rows[0][:7], -rows[1][:7], rows[2][:7], np.full(7, 0.5, np.float32), 4)
    assert ray.get(actor.upsert.remote(*some)) == bank.upsert(*some)
    seen = ray.get(actor.snapshot.remote())
    corrected = Commit(seen.ids[:9], seen.text[:9], seen.audio[:9], seen.version[:9], 5, [(rows[1][:2], rows[2][:2])])
    assert ray.get(actor.commit.remote(corrected)) == bank.commit(corrected)
    killed(actor)
    for name, value in vars(bank.snapshot()).items():
        assert name == "life" or np.array_equal(getattr(ray.get(actor.snapshot.remote()), name), value)
    assert ray.get(actor.prototypes.remote()).generation == 1
    assert ray.get(actor.metrics.remote())["bank/durable"] == 1
    ray.get(actor.load.remote([str(tmp_path / "checkpoint")]))  # back to before the second write
    killed(actor)
    np.testing.assert_array_equal(ray.get(actor.snapshot.remote()).step, 3)
    ray.get(actor.load.remote([]))
    killed(actor)
    assert ray.get(actor.ping.remote()) == 0


def test_a_commit_that_was_made_for_a_bank_that_died_is_not_for_the_one_that_came_back(start_actor, rows):
    actor = start_actor()
    ray.get(actor.upsert.remote(*rows, None, 3))
    seen = ray.get(actor.snapshot.remote())
    killed(actor)
    ray.get(actor.upsert.remote(*rows, None, 9))
    now = ray.get(actor.snapshot.remote())
    np.testing.assert_array_equal(now.version, seen.version)
    commit = Commit(seen.ids, seen.text, seen.audio, seen.version, 4, [(rows[1], rows[2])], seen.life)
    result = ray.get(actor.commit.remote(commit))
    assert (result.applied, result.generation) == (0, 0)
    np.testing.assert_array_equal(ray.get(actor.snapshot.remote()).audio, now.audio)
    assert ray.get(actor.prototypes.remote()) is None


def test_a_full_disk_costs_a_durable_bank_nothing_but_durability(start_actor, rows, small_disk):
    actor = start_actor(durable_path=str(small_disk / "bank"))
    assert ray.get(actor.metrics.remote())["bank/durable"] == 1
    fill(small_disk)
    for step in range(2):
        assert ray.get(actor.upsert.remote(*rows, None, step)) == ROWS
    assert ray.get(actor.metrics.remote())["bank/durable"] == 0
    assert ray.get(actor.search_ids.remote(rows[0][:3])).rows == ROWS


def test_a_save_waits_for_a_bank_that_is_being_restarted(start_actor, rows, tmp_path):
    actor = start_actor(durable_path=str(tmp_path / "bank"))
    ray.get(actor.upsert.remote(*rows, None, 3))
    process = process_of(actor)
    os.kill(process, signal.SIGSTOP)
    saving = actor.save.remote(str(tmp_path / "checkpoint"))
    os.kill(process, signal.SIGKILL)
    ray.get(saving)
    assert len(store.load(tmp_path / "checkpoint")["ids"]) == ROWS


def test_prefetched_neighbours_are_collected_once(start_actor, rows):
    actor = start_actor()
    client = BankClient(actor)
    assert client.collect() is None
    client.upsert(*rows, None, 1)
    wait_for_rows(actor, ROWS)
    knowledge = answer_in_time(client, rows[0][:5])
    local = KnowledgeBank(**SETTINGS)
    local.upsert(*(np.asarray(part, kind) for part, kind in zip(rows, (int, "f2", "f2"), strict=True)), None, 1)
    np.testing.assert_array_equal(knowledge.ids, local.search_ids(rows[0][:5], 4).ids)
    assert client.collect() is None
    assert client.metrics()["bank/failed"] == client.metrics()["bank/dropped_upserts"] == 0


def test_a_busy_bank_makes_answers_late_and_drops_upserts_but_blocks_nobody(start_actor, rows):
    actor = start_actor()
    client = BankClient(actor, max_in_flight=2)
    client.upsert(*rows, None, 0)
    wait_for_rows(actor, ROWS)
    process = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGSTOP)  # as busy as a bank can be
    try:
        for step in range(1, 5):
            client.upsert(*rows, None, step)
            client.prefetch(rows[0][:3])
            assert client.collect() is None
    finally:
        os.kill(process, signal.SIGCONT)
    assert client.metrics()["bank/late_share"] == 1
    assert client.metrics()["bank/failed"] == 0
    assert client.metrics()["bank/dropped_upserts"] >= 2
    assert answer_in_time(client, rows[0][:3]).rows == ROWS
    assert client.metrics()["bank/late_share"] < 1


def test_a_deterministic_client_waits(start_actor, rows):
    client = BankClient(start_actor(), deterministic=True)
    for step in range(5):
        client.upsert(*rows, None, step)
        client.prefetch(rows[0][step : step + 4])
        assert client.collect().newest_step == step
    assert client.metrics()["bank/late_share"] == 0.0


def test_prototypes_follow_the_generation(start_actor, rows):
    actor = start_actor()
    client = BankClient(actor, deterministic=True)
    client.upsert(*rows, None, 1)
    client.prefetch(rows[0][:2])
    client.collect()
    assert client.prototypes is None
    seen = ray.get(actor.snapshot.remote())
    for generation in (1, 2):
        ray.get(actor.commit.remote(Commit.of_prototypes([(rows[1][:generation], rows[2][:generation])], seen)))
        client.prefetch(rows[0][:2])
        client.collect()
        assert client.prototypes.generation == generation
        assert len(client.prototypes.levels[0][0]) == generation


def test_a_bank_that_dies_is_counted_and_steps_go_on(start_actor, rows):
    actor = start_actor()
    client = BankClient(actor, deterministic=True)
    client.upsert(*rows, None, 2)
    client.prefetch(rows[0][:2])
    assert client.collect().rows == ROWS
    ray.kill(actor, no_restart=False)
    answers = []
    while not answers or answers[-1] is None or answers[-1].rows == ROWS:  # until the restarted actor answers
        client.prefetch(rows[0][:2])
        answers.append(client.collect())
    assert answers[-1].rows == 0  # it keeps nothing, unless it is durable
    assert client.metrics()["bank/failed"] == sum(answer is None for answer in answers)


def test_a_refused_upsert_is_counted(start_actor, rows):
    client = BankClient(start_actor(capacity=10), deterministic=True)
    client.upsert(*rows, None, 1)
    client.upsert(*(part[:5] for part in rows), None, 2)
    assert client.metrics()["bank/failed"] == 1
