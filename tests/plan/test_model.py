"""The queueing model against textbook cases and against queues that are simulated call by call."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ask_dist.bank import actor
from ask_dist.plan.constants import Constants
from ask_dist.plan.model import (
    FOLLOW_SECONDS,
    Layout,
    Load,
    Node,
    breaking_point,
    mean_wait,
    predict,
    recommend,
    smallest,
    tail,
    wait_quantile,
    work,
)

CONSTANTS = Constants(
    machine={},
    dim=256,
    neighbours=16,
    search={"flat": {"fixed": 1e-4, "growth": 2e-8}, "ivf_flat": {"fixed": 5e-5, "growth": 1e-6}},
    upsert={"flat": 5e-6, "ivf_flat": 5e-5},
    snapshot=1e-6,
    commit=3e-6,
    look={"fixed": 1e-5, "growth": 2e-10},
    refine={"kernel": {"fixed": 0.5, "growth": 3e-6}, "reencode": {"fixed": 0.1, "growth": 1e-6}},
    prototypes={"fixed": 0.1, "growth": 2e-5},
    prototype_rows=30_000,
    encoding=0.4,
    call=5e-4,
    round_trip=1e-3,
    submit=2e-4,
    byte=3e-10,
    memory={
        "flat": {"float16": {"fixed": 200, "growth": 16}},
        "ivf_flat": {"float16": {"fixed": 300, "growth": 40}},
    },
)
NODE = Node(memory=64 * 2**30, network=25e9 / 8)
LOAD = Load(
    workers=16,
    rows=1_000_000,
    step_seconds=0.25,
    batch=16,
    dim=256,
    neighbours=16,
    precision="float16",
    threads=8,
    strategy="kernel",
    interval=2.0,
    cpu_share=0.1,
    every=0.5,
    clips=1_000_000,
)
ONE = Layout("ivf_flat", 1, 1)


def simulated_waits(rates: list[float], seconds: list[float], calls: int) -> np.ndarray:
    """Waits at one server of Poisson arrivals of several classes, by Lindley's recursion."""
    rng = np.random.default_rng(0)
    gaps = rng.exponential(1.0 / sum(rates), calls)
    service = rng.choice(seconds, calls, p=np.array(rates) / sum(rates))
    waits = np.zeros(calls)
    for call in range(1, calls):
        waits[call] = max(0.0, waits[call - 1] + service[call - 1] - gaps[call])
    return waits


def test_the_mean_wait_is_that_of_m_d_1_and_of_m_m_1():
    assert mean_wait([(0.5, 1.0)], busy=0.5) == pytest.approx(0.5)  # rho s / (2 (1 - rho))
    assert mean_wait([(2.0, 1.0)], busy=2.0) == math.inf


def test_the_tail_is_exact_for_m_m_1():
    rate, served = 0.6, 1.0
    wait = rate / (served - rate)
    assert tail(0.6, wait, 2.0) == pytest.approx(0.6 * math.exp(-(served - rate) * 2.0))
    assert tail(0.6, wait, wait_quantile(0.6, wait, 0.99)) == pytest.approx(0.01)
    assert (tail(1.0, math.inf, 5.0), tail(0.6, wait, -0.1), tail(0.0, 0.0, 1.0)) == (1.0, 1.0, 0.0)
    assert wait_quantile(0.005, wait, 0.99) == 0.0  # fewer than one in a hundred wait at all


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_searches_and_upserts_at_one_server_wait_as_a_simulation_says(busy):
    seconds = [0.04, 0.002]
    rate = busy / sum(seconds)
    waits = simulated_waits([rate, rate], seconds, 200_000)
    wait = mean_wait([(rate, each) for each in seconds], busy)
    assert wait == pytest.approx(waits.mean(), rel=0.06)
    assert wait_quantile(busy, wait, 0.99) == pytest.approx(np.quantile(waits, 0.99), rel=0.25)


def test_the_slowest_of_several_servers_waits_longer():
    single = simulated_waits([10.0], [0.06], 150_000)
    slowest = single.reshape(3, -1).max(axis=0)
    wait = mean_wait([(10.0, 0.06)], 0.6)
    assert wait_quantile(0.6, wait, 0.99, servers=3) == pytest.approx(np.quantile(slowest, 0.99), rel=0.25)


def test_replicas_share_searches_and_shards_share_rows():
    alone, two, split = (
        predict(LOAD, layout, CONSTANTS, NODE) for layout in (ONE, Layout("ivf_flat", 1, 2), Layout("ivf_flat", 4, 1))
    )
    assert two.busy < alone.busy
    assert two.memory_all == pytest.approx(2 * alone.memory_all)
    assert two.memory_shard == pytest.approx(alone.memory_shard)
    assert split.memory_shard == pytest.approx(alone.memory_shard / 4)
    assert split.network_bank < alone.network_bank + work(LOAD, Layout("ivf_flat", 4, 1), CONSTANTS).exchanged * 64


def test_upserts_are_not_shared_by_replicas():
    outcomes = [predict(replace(LOAD, workers=100_000), Layout("flat", 1, r), CONSTANTS, NODE) for r in (64, 256)]
    assert all(outcome.busy > 1.0 and outcome.busy_with == "upserts" for outcome in outcomes)


def test_each_replica_asks_its_primary_and_has_it_look_through_its_rows():
    quiet = replace(LOAD, strategy="none", workers=1, step_seconds=1e6)  # nobody else asks for anything
    alone, followed = (predict(quiet, Layout("ivf_flat", 2, r), CONSTANTS, NODE) for r in (1, 256))
    assert alone.busy < 1e-6
    assert followed.busy_with == "its replicas"
    assert followed.busy == pytest.approx(2 * 255 * (5e-4 + 1e-5 + 500_000 * 2e-10), rel=1e-3)
    crowded = predict(quiet, Layout("ivf_flat", 2, 1024), CONSTANTS, NODE)
    assert crowded.problems[0] == "busy: 1.25, most with its replicas"
    assert (crowded.late_share, crowded.lockstep_p99) == (1.0, math.inf)


def test_replicas_ask_as_often_as_the_model_says():
    assert actor.FOLLOW_SECONDS == FOLLOW_SECONDS


def test_a_bank_that_can_t_keep_up_answers_late():
    outcome = predict(replace(LOAD, workers=100_000), ONE, CONSTANTS, NODE)
    assert outcome.busy > 1.0
    assert (outcome.late_share, outcome.answer_p99, outcome.lockstep_p99) == (1.0, math.inf, math.inf)
    assert any(problem.startswith("busy") for problem in outcome.problems)


def test_in_lockstep_the_last_answer_takes_the_busy_share_of_a_step():
    load_ = replace(LOAD, strategy="none", workers=60)
    layout = Layout("ivf_flat", 1, 16)
    part, outcome = work(load_, layout, CONSTANTS), predict(load_, layout, CONSTANTS, NODE)
    all_served, asked = 60 * part.upsert + 60 / 16 * part.search, 15 / FOLLOW_SECONDS * part.look
    assert outcome.busy == pytest.approx(all_served / LOAD.step_seconds + asked)
    assert outcome.lockstep_p99 == pytest.approx(all_served / (1 - asked), rel=0.05)


def test_a_long_hold_by_the_refiner_makes_answers_late():
    quiet = predict(replace(LOAD, strategy="none"), Layout("ivf_flat", 1, 4), CONSTANTS, NODE)
    slow = CONSTANTS.model_copy(update={"commit": 1e-4})  # 100 s for a million rows
    held = predict(LOAD, Layout("ivf_flat", 1, 4), slow, NODE)
    assert quiet.late_share < 0.01
    assert held.late_share > 0.1
    assert held.busy > quiet.busy
    assert quiet.generation == math.inf


@pytest.mark.parametrize(("workers", "rows"), [(8, 10**6), (64, 10**6), (32, 10**7)])
def test_what_is_recommended_holds_and_nothing_smaller_does(workers, rows):
    load_ = replace(LOAD, workers=workers, rows=rows)
    found = recommend(load_, CONSTANTS, NODE)
    assert not found.problems
    fewer = [
        Layout(index, 2**s, 2**r)
        for index in CONSTANTS.indexes(gpu=False)
        for s in range(11)
        for r in range(9)
        if 2 ** (s + r) < found.layout.actors
    ]
    assert all(predict(load_, layout, CONSTANTS, NODE).problems for layout in fewer)


def test_where_nothing_holds_the_problems_are_named():
    small = Node(memory=2**20, network=1e6)
    found = smallest(replace(LOAD, workers=1024, rows=10**9), "flat", CONSTANTS, small)
    assert found.problems
    assert any("memory" in problem for problem in found.problems)


@pytest.mark.parametrize("grown", ["workers", "rows"])
def test_a_layout_holds_up_to_its_breaking_point(grown):
    layout = recommend(LOAD, CONSTANTS, NODE).layout
    most, problem = breaking_point(LOAD, layout, CONSTANTS, NODE, grown)
    assert most >= getattr(LOAD, grown)
    assert problem
    at, past = (replace(LOAD, **{grown: value}) for value in (most, int(most * 1.02) + 2))
    assert not predict(at, layout, CONSTANTS, NODE).problems
    assert predict(past, layout, CONSTANTS, NODE).problems


def test_many_shards_cost_a_worker_its_time():
    few, many = (predict(LOAD, Layout("ivf_flat", shards, 1), CONSTANTS, NODE) for shards in (4, 256))
    assert few.sending < 0.1
    assert any(problem.startswith("sending") for problem in many.problems)


def test_a_pass_of_reencode_adds_its_part_to_a_step():
    plain, again = (predict(replace(LOAD, strategy=name), ONE, CONSTANTS, NODE) for name in ("none", "reencode"))
    encoded = 1_000_000 / (16 * 16) * 0.4 * 0.25  # clips that a worker encodes, at a share of their part of a step
    written = 1_000_000 * (5e-5 + 5e-4 / 1024)
    assert again.reencoding == pytest.approx(encoded + written)
    between = 0.5 * 1_000_000 / (16 * 16)
    assert again.step_seconds == pytest.approx(0.25 + (encoded + written) / between)
    assert (plain.reencoding, plain.step_seconds) == (0.0, 0.25)
    assert again.generation == pytest.approx(between * again.step_seconds)


def test_the_refiner_needs_memory_for_all_rows_and_network_for_each_generation():
    alone, split = (predict(LOAD, Layout("ivf_flat", shards, 1), CONSTANTS, NODE) for shards in (1, 4))
    sources = 10**6 * 2 * (2 * 256 + 16)
    held = 10**6 * ((4 * 256 + 36) + (2 * 256 + 16) + (4 * 256 + 16))  # a snapshot, a new source, a commit
    assert alone.memory_refiner == pytest.approx(300 * 2**20 + sources + held)
    assert split.memory_refiner == pytest.approx(300 * 2**20 + sources + held / 4)
    assert alone.network_refiner == pytest.approx(10**6 * (8 * 256 + 52) / alone.generation)
    none = predict(replace(LOAD, strategy="none"), ONE, CONSTANTS, NODE)
    assert (none.memory_refiner, none.network_refiner) == (0.0, 0.0)
    assert alone.network_bank - none.network_bank == pytest.approx(alone.network_refiner)


def test_more_rows_cost_reencode_more_and_more_workers_and_rarer_passes_less():
    def step(**changed: float) -> float:
        load_ = replace(LOAD, strategy="reencode", **changed)
        return predict(load_, Layout("ivf_flat", 4, 1), CONSTANTS, NODE).step_seconds

    assert step(rows=2_000_000) > step() > step(every=2.0) > 0.25
    passes = [predict(replace(LOAD, strategy="reencode", workers=n), ONE, CONSTANTS, NODE) for n in (16, 64)]
    assert passes[0].reencoding > passes[1].reencoding


def test_where_all_rows_are_encoded_again_the_refiner_writes_none():
    again, kernel = (work(replace(LOAD, strategy=name), ONE, CONSTANTS) for name in ("reencode", "kernel"))
    assert again.hold == pytest.approx(1_000_000 * 1e-6)
    assert kernel.hold == pytest.approx(1_000_000 * 4e-6)
    assert again.generation == pytest.approx((0.1 + 1.0 + 0.1 + 0.6) / 0.1)
    assert kernel.generation == pytest.approx((0.5 + 3.0 + 0.1 + 0.6) / 0.1)
