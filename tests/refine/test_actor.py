"""The refiner's actor beside a bank actor, on a real Ray."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray

from ask_dist.bank.actor import RemoteBankActor
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
    reports = []
    wait_for(lambda: reports.extend(ray.get(refiner.reports.remote())) or reports)
    assert (reports[0]["fresh"], reports[0]["stale"]) == (300, 100)
    assert ray.get(bank.snapshot.remote()).frame.min() == 5
    prototypes = ray.get(bank.prototypes.remote())
    assert [len(level) for level, _ in prototypes.levels] == [4, 16]
    assert ray.get(refiner.metrics.remote())["refine/drift_after_audio"] == reports[0]["drift_after_audio"]
    state = ray.get(refiner.state.remote())
    assert "source.audio.values" in state
    ray.get(refiner.load_state.remote(state))

    ray.kill(bank, no_restart=False)
    wait_for(lambda: _if_up(lambda: ray.get(bank.ping.remote()) == 0))  # it is back, and empty
    ray.get(bank.upsert.remote(ids, audio, text, None, 9))
    wait_for(lambda: _if_up(lambda: ray.get(bank.prototypes.remote())))
    ray.get(refiner.reports.remote())  # would raise if it had given up
    ray.get(refiner.stop.remote())


def test_failures_in_a_row_end_it_visibly(start):
    bank = start(RemoteBankActor, name="bank-b", neighbours=4, dim=4, capacity=10)
    ray.kill(bank)
    refiner = start(RemoteRefineActor, ["bank-b"], interval=0.0)
    wait_for(lambda: ray.get(refiner.metrics.remote())["refine/failures"] == MAX_FAILURES)
    with pytest.raises(RuntimeError, match="gave up after 5 failures in a row"):
        ray.get(refiner.reports.remote())


def _if_up(call):
    try:
        return call()
    except ray.exceptions.RayActorError:
        return None
