"""Searches a second through the bank actor against the same search in this process."""

from __future__ import annotations

import statistics
import time
from collections import deque
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
    """Alternate rounds of searches by id in process and through the actor, pipelined as `BankClient` bounds it.

    Needs an initialised Ray with one free CPU. Every answer of the actor is read by the caller.

    Returns:
        `in_process_searches_per_s` and `actor_searches_per_s` (medians over the rounds), `ratio` (actor / in process),
        and the setting.
    """
    rng = np.random.default_rng(seed)
    ids = np.arange(rows, dtype=np.int64)
    audio, text = (unit_rows(rng.normal(size=(rows, dim))).astype(np.float16) for _ in range(2))
    settings: dict[str, Any] = {"dim": dim, "capacity": rows, "threads": threads}
    bank = KnowledgeBank(**settings)
    actor = RemoteBankActor.options(num_cpus=1).remote(neighbours=neighbours, **settings)
    try:
        bank.upsert(ids, audio, text, None, 0)
        ray.get(actor.upsert.remote(ids, audio, text, None, 0))
        batches = [rng.choice(ids, queries, replace=False) for _ in range(searches)]
        in_process, through_actor = [], []
        _search_actor(actor, batches, in_flight)  # warms both sides up
        for _ in range(rounds):
            in_process.append(_seconds(lambda: [bank.search_ids(batch, neighbours) for batch in batches]))
            through_actor.append(_seconds(lambda: _search_actor(actor, batches, in_flight)))
    finally:
        ray.kill(actor)
    here, there = (searches / statistics.median(seconds) for seconds in (in_process, through_actor))
    return {
        "in_process_searches_per_s": here,
        "actor_searches_per_s": there,
        "ratio": there / here,
        **{"rows": rows, "dim": dim, "queries": queries, "neighbours": neighbours, "threads": threads},
    }


def _search_actor(actor, batches: list[np.ndarray], in_flight: int) -> None:
    outstanding: deque[Any] = deque()
    for batch in batches:
        if len(outstanding) == in_flight:
            ray.get(outstanding.popleft())
        outstanding.append(actor.search_ids.remote(batch))
    ray.get(list(outstanding))


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
