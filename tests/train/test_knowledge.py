"""A worker's link to the bank: when it gives up, and how a checkpoint comes back in another number of shards."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import psutil
import pytest
import ray
import torch

from ask_dist import cluster, config
from ask_dist.bank import durable, store
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.prototypes import unit_rows
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.models import saved
from ask_dist.train import checkpoint, knowledge
from ask_dist.train.knowledge import KnowledgeSource, load_actors, refiner_state, save_bank
from ask_dist.train.reencode import put_parts
from tests.finished_run import noise_corpus, untrained_run
from tests.mounts import fill
from tests.snapshots import crafted

pytestmark = pytest.mark.ray
DIM, ROWS = 8, 120


def run_config(sections: dict, **bank) -> Config:
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
        | sections
    )


@pytest.fixture
def started(local_ray):
    """Links to banks of their own."""
    running = []

    def start(sections=None, **bank) -> tuple[KnowledgeSource, cluster.Actors]:
        run = run_config(sections or {}, **bank)
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
        checkpoint.save(
            folder, engine={}, arrays={}, banks=banks, global_step=3, samples_seen=9, skipped_steps=0, lineage="same"
        )
        link, actors = started(shards=shards)
        load_actors(actors, folder)
        assert answer(link, ids[:9]) == expected
        assert link.last_metrics()["bank/rows"] == ROWS
        stored = link.stored_rows(np.array([5, ROWS + 1, 2]))
        assert stored.ids.tolist() == [2, 5]
        np.testing.assert_array_equal(stored.text, text[[2, 5]].half().float())
    assert sorted(path.name for path in folder.glob("bank*")) == ["bank-0", "bank-1"]


def test_external_rows_over_several_shards_answer_as_one_actor_does(started, tmp_path):
    """20,000 rows, some texts alone: each actor takes its part when it starts, and when it is emptied."""
    run = untrained_run(tmp_path / "run", noise_corpus(tmp_path / "corpus", 4))
    rng, count, dim = np.random.default_rng(8), 20_000, 32
    centres, ids = rng.normal(size=(200, dim)), rng.choice(2**62, count, replace=False)
    audio, text = (unit_rows(centres[np.arange(count) % 200] + 0.7 * rng.normal(size=(count, dim))) for _ in range(2))
    audio[::10] = 0.0
    bank = KnowledgeBank(dim, count)
    bank.upsert(ids, audio, text, None, 0)
    store.save(tmp_path / "bank", bank.state(), weights=saved.digest(run))
    source = {"model": {"embedding_dim": dim, "from": str(run)}}

    def asked(shards: int) -> dict[int, tuple[list[float], list[float], float, float]]:
        link, actors = started(source, shards=shards, **{"from": str(tmp_path / "bank")})
        told = link.last_metrics()
        assert (told["bank/rows"], told["bank/external_rows"]) == (count, count)
        held = [ray.get(primary.ping.remote()) for primary in actors.primaries.values()]
        assert sum(held) == count
        assert min(held) > 0.9 * count / shards
        load_actors(actors, None)  # as a start without a checkpoint does
        link.prefetch(torch.from_numpy(ids[:64]), 0.5)
        rows = link.collect()
        np.testing.assert_allclose(rows.own_text, text[:64], atol=1e-3)
        answers = zip(
            rows.audio.tolist(), rows.text.tolist(), rows.age.tolist(), rows.reliability.tolist(), strict=True
        )
        return dict(zip(rows.ids.tolist(), answers, strict=True))

    expected = asked(1)
    assert len(expected) > 64
    assert asked(2) == expected
    assert asked(3) == expected


@pytest.mark.parametrize("shards", [1, 2])
def test_rows_that_are_put_are_there_or_it_is_told(started, shards):
    rows = unit_rows(np.random.default_rng(4).normal(size=(ROWS, DIM)))
    link, _ = started(shards=shards, capacity=ROWS)
    link.put(np.arange(ROWS), rows, rows, 0)
    assert link.last_metrics()["bank/rows"] == ROWS
    with pytest.raises(InputError, match=r"rows exceed the bank's capacity of .*: raise bank\.capacity"):
        link.put(np.arange(ROWS, 3 * ROWS), np.tile(rows, (2, 1)), np.tile(rows, (2, 1)), 0)


@pytest.fixture
def held(started):
    """A link to a bank of 120 rows, ids from 0, which is not deterministic, the bank, and its process, stopped."""
    link, actors = started({"optimization": {"deterministic": False}})
    rows = unit_rows(np.random.default_rng(6).normal(size=(ROWS, DIM))).astype(np.float32)
    link.put(np.arange(ROWS), rows, rows, 0)
    process = ray.get(actors.bank[0][0].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGSTOP)
    yield link, actors.bank[0][0], process
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


def parts_of(count: int, taken: list[int]) -> Iterator[tuple[np.ndarray, ...]]:
    """So many parts of 120 rows each, ids from 1000 on; notes which were taken."""
    rows = unit_rows(np.random.default_rng(7).normal(size=(ROWS, DIM))).astype(np.float32)
    for part in range(count):
        taken.append(part)
        yield np.arange(ROWS) + 1000 * (part + 1), rows, rows


def up(bank) -> bool:
    try:
        return ray.get(bank.ping.remote()) >= 0
    except ray.exceptions.RayActorError:
        return False


def test_a_bank_that_dies_while_it_is_written_to_costs_what_it_had_and_what_it_is_sent_meanwhile(held):
    link, bank, process = held

    def slow_parts() -> Iterator[tuple[np.ndarray, ...]]:
        for rows in parts_of(4, taken):
            yield rows
            while not up(bank):  # encoding takes longer than Ray does to restart it
                time.sleep(0.05)

    killing = threading.Timer(0.5, os.kill, (process, signal.SIGKILL))  # it waits in the first part's call by then
    killing.start()
    taken = []
    put_parts(link, slow_parts(), 1, deterministic=False)
    killing.join()
    assert taken == [0, 1, 2, 3]
    assert link.last_metrics()["bank/rows"] == 3 * ROWS
    assert sorted(set(link.stored_rows(np.arange(10_000)).ids // 1000)) == [2, 3, 4]


def test_a_bank_that_hangs_while_it_is_written_to_is_left_alone_until_the_next_time(held, monkeypatch):
    link, _, process = held
    monkeypatch.setattr(knowledge, "PUT_SECONDS", 0.2)
    taken = []
    put_parts(link, parts_of(4, taken), 1, deterministic=False)
    assert taken == [0]
    os.kill(process, signal.SIGCONT)
    while link.last_metrics()["bank/rows"] < 2 * ROWS:  # what it was sent it takes after all, beside other calls
        time.sleep(0.02)
    assert sorted(set(link.stored_rows(np.arange(10_000)).ids // 1000)) == [0, 1]


def test_a_checkpoint_is_left_out_while_the_bank_hangs_and_the_next_is_whole(held, tmp_path, monkeypatch):
    link, bank, process = held
    monkeypatch.setattr(knowledge, "SAVE_SECONDS", 0.5)

    def write(step: int) -> list[str]:
        checkpoint.write(
            tmp_path,
            2,
            engine={"weight": torch.ones(3)},
            arrays={},
            banks={"bank": partial(save_bank, bank)},
            global_step=step,
            samples_seen=9,
            skipped_steps=0,
            lineage="same",
        )
        return sorted(path.name for path in (tmp_path / checkpoint.FOLDER).iterdir())

    os.kill(process, signal.SIGCONT)
    assert write(3) == ["checkpoint_000000003"]
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        write(4)
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["checkpoint_000000003"]
    os.kill(process, signal.SIGCONT)  # now it writes the snapshot of step 4, which nobody wants, beside the next one
    link.put(np.arange(5) + ROWS, *2 * [np.ones((5, DIM), np.float32)], 5)
    assert write(5)[-2:] == ["checkpoint_000000003", "checkpoint_000000005"]
    folder = tmp_path / checkpoint.FOLDER / "checkpoint_000000005"
    checkpoint.load_manifest(folder, "same")
    assert len(store.load(folder / "bank")["ids"]) == ROWS + 5


def test_a_bank_that_hangs_when_it_is_put_back_is_started_again_from_the_checkpoint(started, tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "SAVE_SECONDS", 2.0)
    link, actors = started({"optimization": {"deterministic": False}, "refine": {"strategy": "none"}})
    (primary,) = actors.primaries.values()
    rows = unit_rows(np.random.default_rng(7).normal(size=(ROWS, DIM))).astype(np.float32)
    link.put(np.arange(ROWS), rows, rows, 3)
    checkpoint.save(
        tmp_path,
        engine={},
        arrays={},
        banks={"bank": partial(save_bank, primary)},
        global_step=3,
        samples_seen=9,
        skipped_steps=0,
        lineage="same",
    )
    link.put(np.arange(2 * ROWS), *2 * [np.tile(rows, (2, 1))], 50)
    os.kill(process := process_of(primary), signal.SIGSTOP)
    load_actors(actors, tmp_path)
    assert process_of(primary) != process
    kept = link.stored_rows(np.arange(2 * ROWS))
    np.testing.assert_array_equal(np.sort(kept.ids), np.arange(ROWS))


def test_a_durable_bank_that_can_t_start_again_ends_the_run_with_its_own_line(started, tmp_path):
    settings = {"output_dir": str(tmp_path), "optimization": {"deterministic": False}}
    link, actors = started(settings, durable=True)
    (primary,) = actors.primaries.values()
    rows = unit_rows(np.random.default_rng(7).normal(size=(ROWS, DIM))).astype(np.float32)
    link.put(np.arange(ROWS), rows, rows, 3)
    newest = store.save(tmp_path / "link" / cluster.BANK / "0", KnowledgeBank(DIM, 10).state(), number=9)
    crafted(newest, psutil.virtual_memory().total // 36 * 2)
    ray.kill(primary, no_restart=False)
    with pytest.raises(InputError, match=r"^\S+snapshot-000000009.json holds .* rows .*: use a larger machine$"):
        save_bank(primary, tmp_path / "checkpoint")


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


def test_a_bank_that_is_late_too_often_ends_the_run(started):
    link, actors = started({"optimization": {"deterministic": False}}, max_late_share=0.5)
    ray.get(actors.bank[0][0].ping.remote())
    os.kill(process := process_of(actors.bank[0][0]), signal.SIGSTOP)
    try:
        for _ in range(knowledge.MINIMUM_ANSWERS - 1):
            link.prefetch(torch.arange(4), 0.5)
            assert link.collect() is None
        link.prefetch(torch.arange(4), 0.5)
        with pytest.raises(
            InputError, match=r"^100% of the bank's answers came late, bank\.max_late_share allows 50%; give it cores"
        ):
            link.collect()
    finally:
        os.kill(process, signal.SIGCONT)


def test_a_checkpoint_goes_without_a_refiner_that_is_dead_or_hangs_which_begins_anew(started, monkeypatch):
    monkeypatch.setattr(knowledge, "REFINER_SECONDS", 2.0)
    monkeypatch.setattr(knowledge, "HUNG_SECONDS", 2.0)
    refine = {"strategy": "linear", "interval": 0.05, "minimum_fresh": 16, "cpu_share": 1.0}
    link, actors = started({"optimization": {"deterministic": False}, "refine": refine})
    rows = unit_rows(np.random.default_rng(8).normal(size=(ROWS, DIM))).astype(np.float32)
    link.put(np.arange(ROWS), rows, rows, 0)
    wait_for(lambda: refiner_state(actors.refiner))
    for signalled in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(process := process_of(actors.refiner), signalled)
        assert refiner_state(actors.refiner) == {}
        assert link.last_metrics()["bank/rows"] == ROWS
        wait_for(lambda process=process: process_of(actors.refiner) != process)
        link.put(np.arange(ROWS), rows, rows, 1 + signalled)
        wait_for(lambda: refiner_state(actors.refiner))
    os.kill(process_of(actors.refiner), signal.SIGSTOP)
    load_actors(actors, None)
    assert link.last_metrics()["bank/rows"] == 0


def test_a_refiner_that_is_put_back_keeps_nothing_of_the_bank_that_was_replaced(started, tmp_path):
    """It goes by its clock: what it saw before the bank was put back it finishes after it was put back itself."""
    refine = {"strategy": "linear", "interval": 0.05, "minimum_fresh": 16, "cpu_share": 1.0}
    link, actors = started({"optimization": {"deterministic": False}, "refine": refine})
    rows = unit_rows(np.random.default_rng(9).normal(size=(ROWS, DIM))).astype(np.float32)
    (primary,) = actors.primaries.values()
    link.put(np.arange(ROWS), rows, rows, 3)
    wait_for(lambda: (refiner_state(actors.refiner).get("generation.source.audio.step", np.zeros(1)) == 3).all())
    arrays, banks = {"refiner": refiner_state(actors.refiner)}, {"bank": partial(save_bank, primary)}
    checkpoint.save(
        tmp_path, engine={}, arrays=arrays, banks=banks, global_step=3, samples_seen=9, skipped_steps=0, lineage="same"
    )
    link.put(np.arange(ROWS), rows[::-1], rows, 50)
    os.kill(process := process_of(primary), signal.SIGSTOP)
    going_on = threading.Timer(1.0, os.kill, (process, signal.SIGCONT))
    going_on.start()  # by then the refiner has asked for the rows of step 50, and the bank is to be put back
    load_actors(actors, tmp_path)
    going_on.join()
    time.sleep(1.0)  # some generations
    assert refiner_state(actors.refiner)["generation.source.audio.step"].max() == 3
    link.put(np.arange(ROWS // 2), rows[: ROWS // 2], rows[: ROWS // 2], 4)
    wait_for(lambda: link.last_metrics().get("refine/fresh") == ROWS // 2)


def test_a_refiner_that_gave_up_is_told_of_once(started):
    link, actors = started({"optimization": {"deterministic": False}, "refine": {"strategy": "linear"}})
    while not ray.get(actors.refiner.metrics.remote()):
        time.sleep(0.05)
    link.metrics()
    assert link.take_problem() is None
    ray.kill(actors.bank[0][0])
    problem = None
    while problem is None:
        time.sleep(0.1)
        link.metrics()
        problem = link.take_problem()
    assert problem.startswith("the refiner gave up, since its generations failed one after the other")
    assert link.metrics()["refine/given_up"] == 1
    assert link.take_problem() is None


def test_a_full_disk_under_the_bank_is_told_of_once_and_again_if_it_fills_again(started, small_disk):
    link, actors = started({"output_dir": str(small_disk)}, durable=True)
    rows = unit_rows(np.random.default_rng(10).normal(size=(ROWS, DIM))).astype(np.float32)
    ray.get(actors.bank[0][0].__ray_call__.remote(lambda _: setattr(durable, "RETRY_SECONDS", 0.1)))

    def told_until(whole: float) -> list[str]:
        told = []
        while link.metrics().get("bank/durable") != whole:
            told.append(link.take_problem())
            time.sleep(0.05)
        told += [link.take_problem() for _ in range(3)]
        return [problem for problem in told if problem]

    assert told_until(1) == []
    for _ in range(2):
        ballast = fill(small_disk)
        link.put(np.arange(ROWS), rows, rows, 1)
        (problem,) = told_until(0)
        assert problem.startswith(f"{small_disk / 'link' / 'bank'} can't be written")
        assert "free space there" in problem
        ballast.unlink()
        assert told_until(1) == []


def process_of(actor) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def wait_for(condition) -> None:
    """Polls; the test's own timeout ends a wait in vain."""
    while True:
        with contextlib.suppress(ray.exceptions.RayActorError):
            if condition():
                return
        time.sleep(0.05)
