"""Many simulated workers on this machine against what the queueing model says of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ask_dist.bank.service import BankService
from ask_dist.bench.bank import pipelined
from ask_dist.bench.latency import answered, running_bank, together
from ask_dist.bench.process import seconds
from ask_dist.bench.rows import clustered
from ask_dist.plan.constants import Constants
from ask_dist.plan.model import Layout, Load, Node, predict, work

ONE = Layout("flat", 1, 1)
OTHERS = (Layout("flat", 2, 1), Layout("ivf_flat", 1, 1))
HERE = Node(memory=2**40, network=10e9)  # caller and bank share a machine: nothing travels
START_SECONDS = 0.5  # until all threads are there


def plan_vs_simulated_workers(
    constants: Constants,
    *,
    rows: int = 50_000,
    dim: int = 256,
    batch: int = 16,
    neighbours: int = 16,
    step_seconds: float = 2.0,
    steps: int = 8,
    shares: Sequence[float] = (0.3, 0.6, 0.8, 1.3),
    lockstep_share: float = 0.6,
    others_share: float = 0.5,
    maintenance_seconds: float = 10.0,
) -> dict[str, Any]:
    """Simulated workers against `ask-dist plan`'s model of one exact bank, of two shards of it, and of inverted files.

    A worker is a thread that sends its rows, asks for the next batch, and rests until a step's time is over; an answer
    that is not there by then is late, and waited for, so that a worker never has two under way. As many workers are
    taken as should keep the bank busy for each of `shares`; over 1 it can't keep up. Their steps begin at random times,
    and once, for `lockstep_share`, all at the same. Two shards, and inverted files, are kept busy for `others_share`.

    Returns:
        `ratio` of the worker steps a second that the bank can serve to those that the model says; both; and by share
        the number of workers, the late share and the mean and p99 wait of the answers, measured and as predicted.
    """
    load = Load(
        workers=1,
        rows=rows,
        step_seconds=step_seconds,
        batch=batch,
        dim=dim,
        neighbours=neighbours,
        precision="float16",
        threads=1,
        strategy="none",
        interval=1.0,
        cpu_share=1.0,
        every=1.0,
        clips=rows,
    )
    capacity = _capacity(load, ONE, constants)
    figure: dict[str, Any] = {}

    def compare(name: str, bank: BankService, layout: Layout, share: float, lockstep: bool = False) -> None:
        workers = max(1, round(share * _capacity(load, layout, constants) * step_seconds))
        asked = replace(load, workers=workers)
        expected = predict(asked, layout, constants, HERE)
        figure[name] = _simulated(bank, asked, steps, lockstep=lockstep) | {"predicted_busy": expected.busy}
        if lockstep:
            figure[name] |= {"predicted_p99_seconds": expected.lockstep_p99}
            return
        figure[name] |= {
            "predicted_late_share": expected.late_share,
            "predicted_mean_seconds": expected.answer_mean,
            "predicted_p99_seconds": expected.answer_p99,
        }

    with running_bank(rows, dim, neighbours) as bank:
        served = _saturated(bank, rows, dim, batch, steps_a_second=capacity, spent=steps * step_seconds)
        for share in shares:
            compare(f"busy_{share:g}", bank, ONE, share)
        compare("lockstep", bank, ONE, lockstep_share, lockstep=True)
    for other in OTHERS:
        with running_bank(
            rows, dim, neighbours, index=other.index, shards=other.shards, maintenance_seconds=maintenance_seconds
        ) as bank:
            compare(f"busy_{others_share:g}_{other.index}_{other.shards}", bank, other, others_share)
    return {
        "ratio": served / capacity,
        "served_steps_per_s": served,
        "predicted_steps_per_s": capacity,
        **{"rows": rows, "dim": dim, "batch": batch, "step_seconds": step_seconds},
        **figure,
    }


def _capacity(load: Load, layout: Layout, constants: Constants) -> float:
    """Worker steps a second that a layout should serve, without a refiner and replicas."""
    part = work(load, layout, constants)
    return 1.0 / (part.search + part.upsert)


def _saturated(bank: BankService, rows: int, dim: int, batch: int, steps_a_second: float, spent: float) -> float:
    """Worker steps a second, a search and an upsert each, that the bank serves when it never has to wait for one."""
    rng = np.random.default_rng(0)
    audio, text = _stored(rows, dim)
    calls: list[Callable[[], Any]] = []
    for _ in range(max(4, int(steps_a_second * spent))):
        ids = rng.choice(rows, batch, replace=False)
        calls.append(lambda ids=ids: bank.search_ids(ids).answers[0])
        calls.append(lambda ids=ids: bank.upsert(ids, audio[ids], text[ids], None, 1)[0])
    return len(calls) / 2 / seconds(lambda: pipelined(calls))


def _stored(rows: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """What the bank was filled with: workers write it anew, so that no list of an inverted file outgrows the others."""
    _, audio, text = (np.concatenate(parts) for parts in zip(*clustered(rows, dim), strict=True))
    return audio, text


def _simulated(bank: BankService, load: Load, steps: int, *, lockstep: bool) -> dict[str, float]:
    """Workers, and of their answers the late share and the mean and p99 seconds. First steps don't count: others have
    not begun."""
    audio, text = _stored(load.rows, load.dim)
    begin = time.monotonic() + START_SECONDS
    waits: list[float] = []

    def worker(number: int) -> None:
        rng = np.random.default_rng(number)
        start = begin + (0.0 if lockstep else rng.uniform(0.0, load.step_seconds))
        for step in range(1 + steps):
            time.sleep(max(0.0, start - time.monotonic()))
            ids = rng.choice(load.rows, load.batch, replace=False)
            bank.upsert(ids, audio[ids], text[ids], None, step)
            wait = seconds(lambda ids=ids: answered(bank, ids))
            start = max(start + load.step_seconds, time.monotonic())
            if step > 0:
                waits.append(wait)

    together([lambda number=number: worker(number) for number in range(load.workers)])
    return {
        "workers": load.workers,
        "late_share": float(np.mean(np.array(waits) > load.step_seconds)),
        "mean_seconds": float(np.mean(waits)),
        "p99_seconds": float(np.quantile(waits, 0.99)),
    }
