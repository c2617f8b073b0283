"""How long callers wait for the bank while others write to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import ray

from ask_dist.bank.actor import RemoteBankActor
from ask_dist.bank.messages import Knowledge
from ask_dist.bank.service import BankService
from ask_dist.bench.process import seconds
from ask_dist.bench.rows import clustered

PATIENCE = 300.0  # seconds until inverted files must be there


def search_p99_under_upserts(
    *,
    rows: int = 100_000,
    dim: int = 256,
    batch: int = 16,
    callers: int = 4,
    upserts_a_second: float = 16.0,
    neighbours: int = 16,
    turn_seconds: float = 10.0,
    turns: int = 3,
    maintenance_seconds: float = 10.0,
    seed: int = 0,
) -> dict[str, float]:
    """Callers that search one after the other without pause, in turns with and without upserts beside them.

    The bank has inverted files, in which a written row has to move. It is sent what the quickstart's two workers send:
    16 rows 16 times a second.

    Returns:
        `ratio` of the p99 with upserts to that without, over all turns; both, both medians, and the searches/s of each.
    """
    with running_bank(rows, dim, neighbours, index="ivf_flat", maintenance_seconds=maintenance_seconds) as bank:
        waits: dict[str, list[float]] = {"idle": [], "busy": []}
        for turn in range(turns):
            waits["idle"] += _turn(bank, rows, batch, callers, turn_seconds, seed + turn)
            with _upserting(bank, dim, batch, upserts_a_second):
                waits["busy"] += _turn(bank, rows, batch, callers, turn_seconds, seed + turn)
    p99 = {side: float(np.quantile(values, 0.99)) for side, values in waits.items()}
    return {
        "ratio": p99["busy"] / p99["idle"],
        **{f"p99_seconds_{side}": value for side, value in p99.items()},
        **{f"median_seconds_{side}": float(np.median(values)) for side, values in waits.items()},
        **{f"searches_per_s_{side}": len(values) / (turns * turn_seconds) for side, values in waits.items()},
        **{"rows": rows, "dim": dim, "batch": batch, "callers": callers, "upserts_a_second": upserts_a_second},
    }


@contextmanager
def running_bank(
    rows: int, dim: int, neighbours: int, *, index: str = "flat", shards: int = 1, maintenance_seconds: float = 10.0
) -> Iterator[BankService]:
    """A bank with clustered rows, ids from 0 on, and room for as many more; an actor a shard, its index trained."""
    actor = RemoteBankActor.options(num_cpus=1)
    settings = {"neighbours": neighbours, "dim": dim, "capacity": 2 * rows, "dtype": "float16"}
    settings |= {"index": index, "inverted_from": 1, "maintenance_seconds": maintenance_seconds}
    bank = BankService([[actor.remote(**settings)] for _ in range(shards)])
    try:
        for chunk in clustered(rows, dim):
            ray.get(bank.upsert(*chunk, None, 0))
        until = time.monotonic() + PATIENCE
        while index != "flat" and _told(bank, "bank/inverted_rows") < rows:
            assert time.monotonic() < until, "no inverted files were trained"
            time.sleep(maintenance_seconds / 10)
        yield bank
    finally:
        for (primary,) in bank.shards:
            ray.kill(primary)


def answered(bank: BankService, ids: np.ndarray) -> Knowledge:
    """What a bank knows of these ids (int64 [n]); waits for it."""
    search = bank.search_ids(ids)
    return search.join(ray.get(list(search.answers)))


def _told(bank: BankService, name: str) -> float:
    """A metric, summed over the shards."""
    return sum(said[name] for said in ray.get([primary.metrics.remote() for primary, *_ in bank.shards]))


def _turn(bank: BankService, rows: int, batch: int, callers: int, turn_seconds: float, seed: int) -> list[float]:
    """Seconds of every search that the callers made in a turn."""
    waits: list[float] = []
    until = time.monotonic() + turn_seconds

    def call(number: int) -> None:
        rng = np.random.default_rng([seed, number])
        while time.monotonic() < until:
            ids = rng.choice(rows, batch, replace=False)
            waits.append(seconds(lambda ids=ids: answered(bank, ids)))

    together([lambda number=number: call(number) for number in range(callers)])
    return waits


@contextmanager
def _upserting(bank: BankService, dim: int, batch: int, a_second: float) -> Iterator[None]:
    """Rows of the bank are written anew all the time, as workers do that visit them again."""
    stop = threading.Event()
    step = _told(bank, "bank/upserts")  # later than anything stored

    def write() -> None:
        sent, start = 0, time.monotonic()
        while not stop.wait(max(0.0, start + sent / a_second - time.monotonic())):
            (ids, audio, text), *_ = clustered(batch, dim, seed=sent + 1)
            ray.get(bank.upsert(ids + sent * batch, audio, text, None, int(step) + sent))
            sent += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Runs each call in a thread of its own, and waits for all."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
