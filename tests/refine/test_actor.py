"""The refiner's actor beside a bank actor, on a real Ray."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import ray

from ask_dist.bank.actor import RemoteBankActor
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import EXTERNAL
from ask_dist.bank.store import save
from ask_dist.evaluate.drift import mean_drift
from ask_dist.refine.actor import MAX_FAILURES, RemoteRefineActor

pytestmark = pytest.mark.ray
ROWS = 400


@pytest.fixture
def start(local_ray):
    started = []

    def start_actor(kind, *arguments, name=None, **settings):
        actor = kind.options(num_cpus=0, name=name).remote(*arguments, **settings)
        started.append(actor)
        return actor

    yield start_actor
    for actor in started:
        ray.kill(actor)


def wait_for(condition):
    """Polls; the test's own timeout ends a wait in vain."""
    while not condition():
        time.sleep(0.05)


def test_generations_run_by_themselves_and_survive_a_bank_restart(start, rows, drift):
    audio, text, ids = rows(ROWS), rows(ROWS), np.arange(ROWS)
    bank = start(RemoteBankActor, name="bank-a", neighbours=4, dim=audio.shape[1], capacity=ROWS)
    refiner = start(
        RemoteRefineActor,
        ["bank-a"],
        prototypes=[4, 16],
        interval=0.1,
        cpu_share=1.0,
        strategy="gnn",
        steps=5,
        hidden=8,
    )
    assert ray.get(refiner.state.remote()) == {}
    ray.get(bank.upsert.remote(ids, audio, text, None, 0))
    wait_for(lambda: ray.get(bank.prototypes.remote()))  # before there is anything to correct
    ray.get(bank.upsert.remote(ids[:300], drift(audio)[:300], drift(text)[:300], None, 5))
    wait_for(lambda: ray.get(refiner.metrics.remote()).get("refine/stale"))
    told = ray.get(refiner.metrics.remote())
    assert (told["refine/fresh"], told["refine/stale"]) == (300, 100)
    assert told["refine/drift_after_audio"] < told["refine/drift_before_audio"]
    assert ray.get(bank.snapshot.remote()).frame.min() == 5
    prototypes = ray.get(bank.prototypes.remote())
    assert [len(level) for level, _ in prototypes.levels] == [4, 16]
    state = ray.get(refiner.state.remote())
    assert "generation.source.audio.values" in state
    ray.get(refiner.load_state.remote(state))

    ray.kill(bank, no_restart=False)
    wait_for(lambda: _if_up(lambda: ray.get(bank.ping.remote()) == 0))  # it is back, and empty
    ray.get(bank.upsert.remote(ids, audio, text, None, 9))
    wait_for(lambda: _if_up(lambda: ray.get(bank.prototypes.remote())))
    assert _is_at_work(refiner)
    ray.get(refiner.stop.remote())


def test_without_a_clock_it_refines_when_told_and_goes_on_from_its_state(start, rows, drift):
    audio, text, ids = rows(ROWS), rows(ROWS), np.arange(ROWS)
    settings = {"prototypes": [4], "by_clock": False, "interval": 0.0, "strategy": "gnn", "steps": 5, "hidden": 8}
    banks, refiners = [], []
    for name in ("bank-f", "bank-g"):
        banks.append(start(RemoteBankActor, name=name, neighbours=4, dim=audio.shape[1], capacity=ROWS))
        refiners.append(start(RemoteRefineActor, [name], **settings))

    def generation(which, step):
        moved = (drift(values, 0.1 * step)[:300] for values in (audio, text))
        ray.get(banks[which].upsert.remote(ids[:300], *moved, None, step))
        ray.get(refiners[which].refine.remote())
        return ray.get(banks[which].snapshot.remote()), ray.get(refiners[which].state.remote())

    ray.get(banks[0].upsert.remote(ids, audio, text, None, 0))
    for step in (0, 1, 2):
        generation(0, step)
    assert ray.get(banks[0].metrics.remote())["bank/generation"] == 3

    # The other one takes up its state, as after a resume: with networks that have learned.
    state = ray.get(refiners[0].state.remote())
    seen = ray.get(banks[0].snapshot.remote())
    ray.get(refiners[1].load_state.remote(state))
    ray.get(
        banks[1].__ray_call__.remote(_become, ray.get(banks[0].__ray_call__.remote(lambda actor: actor._bank.state())))
    )
    assert any("strategy" in name for name in state)
    (mine, my_state), (its, its_state) = generation(0, 3), generation(1, 3)
    assert (mine.frame > seen.frame)[300:].all()
    for name, values in vars(mine).items():
        assert name == "life" or np.array_equal(values, getattr(its, name))
    assert my_state.keys() == its_state.keys()
    for name, values in my_state.items():
        np.testing.assert_array_equal(values, its_state[name])
    time.sleep(0.5)
    assert ray.get(banks[0].metrics.remote())["bank/generation"] == 4  # nobody told it to


def _become(actor, state):
    actor._bank = actor._made(state)


def test_failures_in_a_row_end_it_visibly(start):
    bank = start(RemoteBankActor, name="bank-b", neighbours=4, dim=4, capacity=10)
    ray.kill(bank)
    refiner = start(RemoteRefineActor, ["bank-b"], interval=0.0)
    wait_for(lambda: not _is_at_work(refiner))
    told = ray.get(refiner.metrics.remote())
    assert (told["refine/failures"], told["refine/given_up"]) == (MAX_FAILURES, 1)


def test_killed_in_a_generation_it_leaves_none_half_done_and_goes_on(start, rows, drift):
    audio, text, ids = rows(ROWS), rows(ROWS), np.arange(ROWS)
    bank = start(RemoteBankActor, name="bank-c", neighbours=4, dim=audio.shape[1], capacity=ROWS)
    ray.get(bank.upsert.remote(ids, audio, text, None, 0))
    refiner = start(RemoteRefineActor, ["bank-c"], prototypes=[4], interval=0.0, cpu_share=1.0, strategy="linear")
    wait_for(lambda: ray.get(refiner.metrics.remote())["refine/generations"])
    for step in range(1, 4):
        ray.get(
            bank.upsert.remote(ids[:300], drift(audio, 0.2 * step)[:300], drift(text, 0.2 * step)[:300], None, step)
        )
        time.sleep(0.02 * step)  # somewhere in a generation, or between two
        os.kill(_pid(refiner), signal.SIGKILL)
        now = ray.get(bank.snapshot.remote())
        assert len(set(now.frame[300:].tolist())) == 1  # all of a commit, or none of it
        wait_for(lambda: _if_up(lambda: ray.get(refiner.metrics.remote())["refine/generations"]))
    before = ray.get(bank.metrics.remote())["bank/generation"]
    ray.get(bank.upsert.remote(ids[:300], drift(audio)[:300], drift(text)[:300], None, 9))
    wait_for(lambda: ray.get(bank.metrics.remote())["bank/generation"] > before)
    wait_for(lambda: ray.get(bank.metrics.remote())["bank/staleness"] == 0)


def test_hanging_it_holds_nobody_up_and_metrics_show_it(start, rows):
    audio, text, ids = rows(ROWS), rows(ROWS), np.arange(ROWS)
    bank = start(RemoteBankActor, name="bank-d", neighbours=4, dim=audio.shape[1], capacity=ROWS)
    refiner = start(RemoteRefineActor, ["bank-d"], interval=0.0, cpu_share=1.0, strategy="linear")
    ray.get(bank.upsert.remote(ids, audio, text, None, 0))
    wait_for(lambda: ray.get(bank.metrics.remote())["bank/generation"])
    process = _pid(refiner)
    os.kill(process, signal.SIGSTOP)
    try:
        shown = [ray.get(bank.metrics.remote())["bank/seconds_since_commit"]]
        for step in range(1, 4):
            ray.get(bank.upsert.remote(ids[:300], audio[:300], text[:300], None, step))
            assert len(ray.get(bank.search_ids.remote(ids[:4])).ids)
            shown.append(ray.get(bank.metrics.remote())["bank/seconds_since_commit"])
        assert shown == sorted(shown)
        assert ray.get(bank.metrics.remote())["bank/staleness"] == 3 * 100 / ROWS
    finally:
        os.kill(process, signal.SIGCONT)
    wait_for(lambda: ray.get(bank.metrics.remote())["bank/staleness"] == 0)


def hold(actor, seconds):
    """Keeps the refiners' lock as a long generation does."""

    def work():
        with actor._lock:
            time.sleep(seconds)

    threading.Thread(target=work, daemon=True).start()


def test_in_a_long_generation_it_tells_its_metrics_however_many_wait_for_its_state(start, rows):
    start(RemoteBankActor, name="bank-m", neighbours=4, dim=4, capacity=ROWS)
    refiner = start(RemoteRefineActor, ["bank-m"], strategy="linear", interval=1e6)
    assert ray.get(refiner.state.remote()) == {}
    ray.get(refiner.__ray_call__.remote(hold, 5.0))
    waiting = [refiner.state.remote() for _ in range(4)]
    assert ray.get(refiner.metrics.remote(), timeout=4.0)["refine/failures"] == 0
    assert not ray.wait(waiting, num_returns=1, timeout=0)[0]
    assert ray.get(waiting) == [{}] * 4


def test_it_takes_no_more_of_a_core_than_its_share(start, rows):
    audio, text, ids, share = rows(ROWS), rows(ROWS), np.arange(ROWS), 0.2
    bank = start(RemoteBankActor, name="bank-h", neighbours=4, dim=audio.shape[1], capacity=ROWS)
    settings = {"interval": 0.0, "cpu_share": share, "strategy": "gnn", "steps": 40, "hidden": 32}
    refiner, step = start(RemoteRefineActor, ["bank-h"], **settings), 0

    def generations() -> float:
        """So far, with something new for the next one to learn from."""
        nonlocal step
        step += 1
        ray.get(bank.upsert.remote(ids, audio, text, None, step))
        return ray.get(refiner.metrics.remote())["refine/generations"]

    def reached(count: float) -> tuple[float, float]:
        while generations() < count:
            time.sleep(0.1)
        return time.monotonic(), ray.get(refiner.__ray_call__.remote(lambda _: time.process_time()))

    first = reached(3)  # its libraries are imported, and it learns
    last = reached(generations() + 4)
    taken = (last[1] - first[1]) / (last[0] - first[0])
    assert share / 4 < taken < 1.5 * share


def test_external_rows_go_on_from_where_the_run_began(start, rows, drift, tmp_path):
    audio, text, ids = rows(ROWS), rows(ROWS), np.arange(ROWS)
    encoded = KnowledgeBank(audio.shape[1], ROWS)
    encoded.upsert(ids[300:], audio[300:], text[300:], None, 0)
    weights = "0" * 64
    save(tmp_path, encoded.state(), weights=weights)
    settings = {"neighbours": 4, "dim": audio.shape[1], "capacity": ROWS}
    bank = start(RemoteBankActor, name="bank-e", begins_with=(str(tmp_path), weights, 0, 1), **settings)
    refiner = start(RemoteRefineActor, ["bank-e"], prototypes=[4], interval=0.0, cpu_share=1.0, strategy="linear")
    ray.get(bank.upsert.remote(ids[:300], audio[:300], text[:300], None, 0))
    ray.get(refiner.begin.remote())
    ray.get(bank.upsert.remote(ids[:300], drift(audio)[:300], drift(text)[:300], None, 5))
    wait_for(lambda: ray.get(refiner.metrics.remote()).get("refine/external_stale"))
    now = ray.get(bank.snapshot.remote())
    rest = np.isin(now.ids, ids[300:])
    assert set(now.step[rest].tolist()) == {EXTERNAL}
    wanted = drift(audio)[now.ids[rest]]
    assert mean_drift(now.audio[rest], wanted) < 0.5 * mean_drift(audio[now.ids[rest]], wanted)
    state = ray.get(refiner.state.remote())
    ray.get(refiner.load_state.remote(state))
    assert {name.partition(".")[0] for name in state} == {"first", "generation"}

    ray.get(bank.load.remote([]))
    assert ray.get(bank.metrics.remote())["bank/external_rows"] == ROWS - 300
    ray.kill(bank, no_restart=False)
    wait_for(lambda: _if_up(lambda: ray.get(bank.ping.remote()) == ROWS - 300))


def _is_at_work(refiner):
    return ray.get(refiner.__ray_call__.remote(lambda actor: actor._thread.is_alive()))


def _pid(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def _if_up(call):
    try:
        return call()
    except ray.exceptions.RayActorError:
        return None
