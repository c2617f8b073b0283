"""Searches a second through the bank actor against the same search in this process."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from ask_dist.bank.actor import RemoteBankActor
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.prototypes import unit_rows
from ask_dist.bench.process import seconds

IN_FLIGHT = 4  # as `BankClient` bounds it
SHORTEST = 4  # searches a round at least


def bank_actor_vs_in_process(
    *,
    rows: int = 20_000,
    dim: int = 256,
    queries: int = 256,
    neighbours: int = 16,
    threads: int = 1,
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
    with _same_bank_twice(rows, dim, neighbours, threads, rng) as (bank, actor, audio):
        chosen = [rng.choice(rows, queries, replace=False) for _ in range(searches)]
        free = _free_rates(bank, actor, [audio[batch] for batch in chosen], neighbours, rounds)
        by_id = _rates(
            [lambda i=i: bank.search_ids(i, neighbours) for i in chosen],
            [lambda i=i: actor.search_ids.remote(i) for i in chosen],
            rounds,
        )
    return {
        "ratio": free[1] / free[0],
        "by_id_ratio": by_id[1] / by_id[0],
        **{"in_process_per_s": free[0], "actor_per_s": free[1]},
        **{"in_process_by_id_per_s": by_id[0], "actor_by_id_per_s": by_id[1]},
        **{"rows": rows, "dim": dim, "queries": queries, "neighbours": neighbours, "threads": threads},
    }


def search_actor_vs_in_process(
    *,
    rows: int = 20_000,
    dim: int = 256,
    sizes: Sequence[int] = (256, 512, 1024, 2048, 4096),
    queries_a_round: int = 4096,
    neighbours: int = 16,
    threads: int = 1,
    rounds: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """Free queries, the same against the same rows in process and through the actor, by queries a search.

    The two sides take turns in rounds of a second or so, since the machine's speed wanders within minutes. Needs an
    initialised Ray with one free CPU.

    Returns:
        `ratio`, the smallest over the sizes, and by size the ratio and both rates in queries/s.
    """
    rng = np.random.default_rng(seed)
    figure: dict[str, Any] = {}
    with _same_bank_twice(rows, dim, neighbours, threads, rng) as (bank, actor, audio):
        for size in sizes:
            searches = max(SHORTEST, queries_a_round // size)
            vectors = [audio[rng.choice(rows, size)] for _ in range(searches)]
            here, there = _free_rates(bank, actor, vectors, neighbours, rounds)
            figure[f"of_{size}"] = {
                "ratio": there / here,
                "in_process_queries_per_s": here * size,
                "actor_queries_per_s": there * size,
            }
    ratio = min(of_size["ratio"] for of_size in figure.values())
    return {"ratio": ratio, **figure, "rows": rows, "dim": dim, "neighbours": neighbours, "threads": threads}


@contextmanager
def _same_bank_twice(
    rows: int, dim: int, neighbours: int, threads: int, rng: np.random.Generator
) -> Iterator[tuple[KnowledgeBank, Any, np.ndarray]]:
    """A bank here, an actor with the same rows, whose ids count from 0, and their audio, float32 [rows, dim]."""
    audio, text = (unit_rows(rng.normal(size=(rows, dim))).astype(np.float16) for _ in range(2))
    settings: dict[str, Any] = {"dim": dim, "capacity": rows, "threads": threads}
    bank = KnowledgeBank(**settings)
    actor = RemoteBankActor.options(num_cpus=1).remote(neighbours=neighbours, **settings)
    try:
        bank.upsert(np.arange(rows), audio, text, None, 0)
        ray.get(actor.upsert.remote(np.arange(rows), audio, text, None, 0))
        yield bank, actor, audio.astype(np.float32)
    finally:
        ray.kill(actor)


def _free_rates(
    bank: KnowledgeBank, actor: Any, vectors: Sequence[np.ndarray], neighbours: int, rounds: int
) -> tuple[float, float]:
    return _rates(
        [lambda v=v: bank.search(v, neighbours, "audio") for v in vectors],
        [lambda v=v: actor.search.remote(v, neighbours, "audio") for v in vectors],
        rounds,
    )


def _rates(here: list[Callable[[], Any]], there: list[Callable[[], Any]], rounds: int) -> tuple[float, float]:
    """Median calls/s in process and through the actor."""
    pipelined(there)  # warms both sides up
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(seconds(lambda: [call() for call in here]))
        times[1].append(seconds(lambda: pipelined(there)))
    return len(here) / statistics.median(times[0]), len(there) / statistics.median(times[1])


def pipelined(calls: Sequence[Callable[[], Any]]) -> None:
    """Makes remote calls, a few in flight at a time, and reads every answer."""
    outstanding: deque[Any] = deque()
    for call in calls:
        if len(outstanding) == IN_FLIGHT:
            ray.get(outstanding.popleft())
        outstanding.append(call())
    ray.get(list(outstanding))
