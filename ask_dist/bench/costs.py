"""The constants of the queueing model behind `ask-dist plan`, measured here: `ask_dist.plan.constants.Constants`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import ray
from scipy.optimize import nnls

from ask_dist import config as configuration
from ask_dist.bank.actor import RemoteBankActor
from ask_dist.bank.index import sees_gpu
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit
from ask_dist.bank.prototypes import build_prototypes, unit_rows
from ask_dist.bank.shard import KnowledgeShard, Mark
from ask_dist.bench.bank import pipelined
from ask_dist.bench.machine import machine
from ask_dist.bench.process import alone, seconds
from ask_dist.bench.rows import bytes_a_row, clustered, filled_bank
from ask_dist.bench.steps import encoding_share
from ask_dist.plan.constants import GPU, Constants, growth_of
from ask_dist.refine.refiner import PROTOTYPE_ROWS, STRATEGIES, Refiner, sampled_rows

INDEXES: tuple[str, ...] = get_args(configuration.Bank.model_fields["index"].annotation)
PRECISIONS: tuple[str, ...] = get_args(configuration.Bank.model_fields["dtype"].annotation)
ROUNDS = 5
LOOKS = 200
LEVELS = configuration.Bank.model_fields["prototypes"].default
OBJECT_BYTES = 32 * 2**20
DRIFT = 0.3  # how far a row moves between two visits, by its length
LATER = 100  # global steps between two visits of a row


def planner_constants(
    config_file: Path,
    *,
    dim: int = 256,
    batch: int = 16,
    neighbours: int = 16,
    sizes: Sequence[int] = (10_000, 40_000, 160_000),
    refined: Sequence[int] = (40_000, 160_000),
    drawn: Sequence[int] = (5_000, 20_000),
    passes: int = 5,
    memory_rows: int = 50_000,
    memory_dims: Sequence[int] = (128, 512),
    calls: int = 500,
) -> dict[str, Any]:
    """Every constant with one thread, medians of a few rounds each. Needs an initialised Ray with one free CPU.

    Search and upsert take batches of 2 x `batch` and `batch` rows, as a worker sends them. Bytes a row are those of a
    process of its own, at its peak, so with what training inverted files takes.

    Args:
        config_file: the run whose steps are compared with encoding its clips again.
        dim, batch, neighbours: of the searches. sizes: rows of the banks that are searched. refined: of those that the
            refiner corrects, enough to have `MAX_FRESH` rows to learn from. drawn: rows that prototypes are made of.
            passes: over the corpus. memory_rows, memory_dims: of the banks whose memory is measured. calls: to the
            actor.
    """
    search, upsert = {}, {}
    for index, gpu in product(INDEXES, (True, False) if sees_gpu() else (False,)):
        times = [_search_and_upsert(index, rows, dim, batch, neighbours, gpu) for rows in sizes]
        search[index + GPU * gpu] = line([growth_of(index, rows) for rows in sizes], [each for each, _ in times])
        upsert[index] = times[-1][1]  # without a GPU
    generations = [_generations(dim, rows) for rows in refined]
    snapshot, commit = _held(dim, max(refined))
    constants = Constants(
        measured=f"One thread, rows {dim} wide, banks of {min(sizes)} to {max(sizes)} rows.",
        machine=machine(),
        dim=dim,
        neighbours=neighbours,
        search=search,  # type: ignore[arg-type]
        upsert=upsert,
        snapshot=snapshot,
        commit=commit,
        look=looks(dim, sizes),  # type: ignore[arg-type]
        refine={name: line(refined, [times[name] for times in generations]) for name in generations[0]},  # type: ignore[arg-type]
        prototypes=line(drawn, [_prototypes(dim, rows) for rows in drawn]),  # type: ignore[arg-type]
        prototype_rows=PROTOTYPE_ROWS,
        encoding=encoding_share(config_file, passes=passes),
        memory={index: _memory(index, memory_rows, memory_dims) for index in INDEXES},  # type: ignore[arg-type]
        **_transport(calls, batch, neighbours, dim),
    )
    return constants.model_dump(mode="json")


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The fixed and growing part, neither negative, of what is nearest to y by relative error."""
    values = np.array(y)
    parts, _ = nnls(np.stack([1.0 / values, np.array(x) / values], axis=1), np.ones(len(values)))
    return {"fixed": float(parts[0]), "growth": float(parts[1])}


def _search_and_upsert(index: str, rows: int, dim: int, batch: int, neighbours: int, gpu: bool) -> tuple[float, float]:
    """Seconds of a query against one modality, and of a row's upsert."""
    bank = filled_bank(index, "float16", rows, dim, gpu)
    rng = np.random.default_rng(0)
    searches, upserts = [], []
    for step in range(1 + ROUNDS):  # the first warms up
        ids = rng.choice(rows, batch, replace=False)
        searches.append(seconds(lambda ids=ids: bank.search_ids(ids, neighbours)) / (2 * batch))
        (_, audio, text), *_ = clustered(batch, dim, seed=step + 1)
        upserts.append(seconds(lambda ids=ids, rows=(audio, text): bank.upsert(ids, *rows, None, LATER)) / batch)
    return statistics.median(searches[1:]), statistics.median(upserts[1:])


def _generations(dim: int, rows: int) -> dict[str, float]:
    """Seconds of a generation without prototypes, by strategy, when a quarter of the rows was re-encoded and has moved
    as all have, so that the others are corrected. Where workers encode them all again, the refiner corrects nothing."""
    bank = filled_bank("flat", "float16", rows, dim)
    first = bank.snapshot()
    renewed = np.arange(rows // 4)
    turn = np.random.default_rng(0).standard_normal((dim, dim), np.float32) / dim**0.5
    before = (half[renewed].astype(np.float32) for half in (first.audio, first.text))
    moved = [unit_rows(half + DRIFT * half @ turn) for half in before]
    bank.upsert(renewed, *moved, None, LATER)
    now, taken = bank.snapshot(), {}
    for strategy in STRATEGIES:
        refiner = Refiner(strategy)
        refiner.refine(first)
        taken["reencode" if strategy == "none" else strategy] = seconds(lambda refiner=refiner: refiner.refine(now))
    return taken


def _prototypes(dim: int, rows: int) -> float:
    """Seconds that prototypes of so many rows take."""
    now = filled_bank("flat", "float16", rows, dim).snapshot()
    return statistics.median(
        seconds(lambda: build_prototypes(*sampled_rows(now, [], rows, 0), LEVELS, 0)) for _ in range(ROUNDS)
    )


def _held(dim: int, rows: int) -> tuple[float, float]:
    """Seconds a row of a snapshot, and of a commit of all rows."""
    bank = filled_bank("flat", "float16", rows, dim)
    snapshots, commits = [], []
    for _ in range(ROUNDS):
        snapshots.append(seconds(bank.snapshot) / rows)
        now = bank.snapshot()
        commit = Commit(now.ids, now.audio, now.text, now.version, LATER)
        commits.append(seconds(lambda commit=commit: bank.commit(commit)) / rows)
    return statistics.median(snapshots), statistics.median(commits)


def looks(dim: int, sizes: Sequence[int]) -> dict[str, float]:
    """Seconds in which a bank finds that nothing was written since a replica last asked, as they grow with its rows."""
    times = []
    for rows in sizes:
        state = filled_bank("flat", "float16", rows, dim).state()
        bank = KnowledgeShard.from_state(state, dim=dim, capacity=rows, dtype="float16")
        mark = Mark(bank.changes(Mark()).mark.life, rows)
        times.append(statistics.median(seconds(lambda bank=bank, mark=mark: bank.changes(mark)) for _ in range(LOOKS)))
    return line(sizes, times)


def _memory(index: str, rows: int, dims: Sequence[int]) -> dict[str, dict[str, float]]:
    """By precision, peak bytes a row as they grow with the width."""
    return {
        precision: line(
            dims,
            [alone(bytes_a_row, index=index, precision=precision, rows=rows, dim=dim) for dim in dims],
        )
        for precision in PRECISIONS
    }


def _transport(calls: int, batch: int, neighbours: int, dim: int) -> dict[str, float]:
    """What Ray takes: seconds of the actor for a search among many and of a lone one, beyond the search itself, in a
    bank that has nothing to search; of the caller for a call; and to store a byte."""
    rows = 2 * batch
    ids, (_, audio, text) = np.arange(batch), next(clustered(rows, dim))
    settings: dict[str, Any] = {"dim": dim, "capacity": rows}
    bank, actor = (
        KnowledgeBank(**settings),
        RemoteBankActor.options(num_cpus=1).remote(neighbours=neighbours, **settings),
    )
    try:
        bank.upsert(np.arange(rows), audio, text, None, 0)
        ray.get(actor.upsert.remote(np.arange(rows), audio, text, None, 0))
        here = statistics.median(seconds(lambda: bank.search_ids(ids, neighbours)) for _ in range(1 + calls // 5))
        pipelined([lambda: actor.search_ids.remote(ids)] * (1 + calls // 10))
        among_many = seconds(lambda: pipelined([lambda: actor.search_ids.remote(ids)] * calls)) / calls
        requests: list[Any] = []
        sent = seconds(lambda: requests.extend(actor.search_ids.remote(ids) for _ in range(calls))) / calls
        ray.get(requests)
        lone = statistics.median(seconds(lambda: ray.get(actor.search_ids.remote(ids))) for _ in range(1 + calls // 5))
    finally:
        ray.kill(actor)
    array = np.ones(OBJECT_BYTES // 4, np.float32)
    stored = statistics.median(seconds(lambda: ray.get(ray.put(array))) for _ in range(ROUNDS))
    return {
        "call": max(0.0, among_many - here),
        "round_trip": max(0.0, lone - here),
        "submit": sent,
        "byte": stored / OBJECT_BYTES,
    }
