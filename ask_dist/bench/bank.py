"""Searches a second through the bank actor against the same search in this process."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from ask_dist.bank.actor import RemoteBankActor
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.prototypes import unit_rows


def bank_actor_vs_in_process(
    *,
    rows: int = 20_000,
    dim: int = 256,
    queries: int = 256,
    neighbours: int = 16,
    threads: int = 1,
    in_flight: int = 4,
    searches: int = 10,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Alternate rounds of searches in process and through the actor, pipelined as `BankClient` bounds it.

    Two kinds of call: `search`, free queries that come back as scores and ids, and `search_ids`, the trainer's call,
    whose answer carries the neighbours' embeddings (7 MB at the defaults). Needs an initialised Ray with one free CPU.
    Every answer of the actor is read by the caller.

    Returns:
        `ratio` (searches/s through the actor by those in process, medians over the rounds) of `search`,
        `by_id_ratio` of `search_ids`, the four rates, and the setting.
    """
    rng = np.random.default_rng(seed)
    ids = np.arange(rows, dtype=np.int64)
    audio, text = (unit_rows(rng.normal(size=(rows, dim))).astype(np.float16) for _ in range(2))
    settings: dict[str, Any] = {"dim": dim, "capacity": rows, "threads": threads}
    bank = KnowledgeBank(**settings)
    actor = RemoteBankActor.options(num_cpus=1).remote(neighbours=neighbours, **settings)
    chosen = [rng.choice(ids, queries, replace=False) for _ in range(searches)]
    vectors = [audio[batch].astype(np.float32) for batch in chosen]
    try:
        bank.upsert(ids, audio, text, None, 0)
        ray.get(actor.upsert.remote(ids, audio, text, None, 0))
        free = _rates(
            [lambda v=v: bank.search(v, neighbours, "audio") for v in vectors],
            [lambda v=v: actor.search.remote(v, neighbours, "audio") for v in vectors],
            in_flight,
            rounds,
        )
        by_id = _rates(
            [lambda i=i: bank.search_ids(i, neighbours) for i in chosen],
            [lambda i=i: actor.search_ids.remote(i) for i in chosen],
            in_flight,
            rounds,
        )
    finally:
        ray.kill(actor)
    return {
        "ratio": free[1] / free[0],
        "by_id_ratio": by_id[1] / by_id[0],
        **{"in_process_per_s": free[0], "actor_per_s": free[1]},
        **{"in_process_by_id_per_s": by_id[0], "actor_by_id_per_s": by_id[1]},
        **{"rows": rows, "dim": dim, "queries": queries, "neighbours": neighbours, "threads": threads},
    }


def _rates(
    here: list[Callable[[], Any]], there: list[Callable[[], Any]], in_flight: int, rounds: int
) -> tuple[float, float]:
    """Median calls/s in process and through the actor."""
    _pipelined(there, in_flight)  # warms both sides up
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        seconds[0].append(_seconds(lambda: [call() for call in here]))
        seconds[1].append(_seconds(lambda: _pipelined(there, in_flight)))
    return len(here) / statistics.median(seconds[0]), len(there) / statistics.median(seconds[1])


def _pipelined(calls: list[Callable[[], Any]], in_flight: int) -> None:
    outstanding: deque[Any] = deque()
    for call in calls:
        if len(outstanding) == in_flight:
            ray.get(outstanding.popleft())
        outstanding.append(call())
    ray.get(list(outstanding))


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
