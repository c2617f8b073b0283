"""What a large bank, and the refiner, cost a training step on this machine's cores."""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from ask_dist import cluster
from ask_dist.bank.client import BankClient
from ask_dist.bank.service import BankService
from ask_dist.bench.rows import clustered
from ask_dist.bench.train import LEARNING
from ask_dist.bench.trainer import WARM_UP, WINDOW, bench_config, windows
from ask_dist.config import Config
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.train import run

FIRST_ID = 2**40  # of the rows that are put in beside the run's own: no clip's
LOOK_SECONDS = 0.2


def knowledge_step_100k(
    config_file: Path,
    *,
    rows: int = 100_000,
    index: str = "ivf_flat",
    steps: int = 900,
    plain_steps: int = 200,
    workers: int = 1,
    warm_up: int = WARM_UP,
    further: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Steps with knowledge out of a large bank, in a run that leaves the bank a core, against plain steps.

    The bank has a refiner with a tenth of a core, as configured by default, and is filled with clustered rows once the
    run has begun. Only windows count in which it holds all of them, with its index trained, and the last step had its
    knowledge in the loss; of these not the first, which may have begun without. A run of plain steps goes before it and
    one after it.

    Args:
        config_file: the run; its test split is trained on.
        rows, index: that the bank is filled with, and its kind.
        steps, plain_steps: of the run with knowledge, and of each without.
        workers: of each run, a core each.
        warm_up: windows of each run that are left out.
        further: settings of every run.

    Returns:
        `ratio` of the median step with knowledge to the plain one, both in seconds, and the share of late answers.

    Raises:
        InputError: the run was over before the bank was ready.
    """
    both: dict[str, object] = {"cluster.num_workers": workers, **(further or {})}
    with_bank = both | {"cluster.bank_cpus": 1, "bank.index": index, "bank.inverted_from": rows}
    with tempfile.TemporaryDirectory() as folder:
        plain = _windows(config_file, folder, "before", plain_steps, False, both)[warm_up:]
        knowledge = _windows(config_file, folder, "knowledge", steps, True, with_bank, rows)[warm_up:]
        plain += _windows(config_file, folder, "after", plain_steps, False, both)[warm_up:]
    wanted = ("bank/rows",) if index == "flat" else ("bank/rows", "bank/inverted_rows")
    ready = [row for row in knowledge if all(row.get(name, 0.0) >= rows for name in wanted)]
    ready = [row for row in ready if row["train/knowledge_used"] == 1.0][1:]
    if not ready:
        raise InputError(f"{steps} steps were over before {rows} rows in a trained {index} were used: take more steps")
    seconds = {"knowledge": _step_seconds(ready), "plain": _step_seconds(plain)}
    return {
        "ratio": seconds["knowledge"] / seconds["plain"],
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "late_share": ready[-1]["bank/late_share"],
        "windows": len(ready),
        "rows": rows,
        "workers": workers,
    }


def knowledge_step_100k_pretrained(
    config_file: Path, *, steps: int = 80, plain_steps: int = 20, **sizes: Any
) -> dict[str, float]:
    """As `knowledge_step_100k`, with encoders as they are trained in earnest: both towers of this run learn. A step
    takes seconds, so that few will do."""
    return knowledge_step_100k(config_file, steps=steps, plain_steps=plain_steps, warm_up=1, further=LEARNING, **sizes)


def refiner_slowdown(config_file: Path, *, steps: int = 200, workers: Sequence[int] = (1, 2)) -> dict[str, float]:
    """Steps beside a refiner against the same steps without one: on a core of its own, and on the workers' cores.

    Windows count from the second epoch on, in which the refiner has re-encoded rows to learn from.

    Args:
        config_file: the run; its test split is trained on.
        steps: of each run.
        workers: of the runs that leave a core to the refiner, and of those in which `refine.cpu_share` alone bounds it.

    Returns:
        `ratio` of the median step beside a refiner with a core of its own to that without, `shared_ratio` of that with
        shared cores, the four medians in seconds, and the generations that were committed.
    """
    seconds: dict[str, float] = {}
    generations: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for where, count, cores in (("own", workers[0], 1), ("shared", workers[1], 0)):
            for strategy in ("none", "kernel"):
                name = f"{where}_{strategy}"
                further = {"cluster.num_workers": count, "refine.strategy": strategy}
                further |= {"cluster.refine_cpus": cores} if strategy != "none" else {}
                rows = _windows(config_file, folder, name, steps, True, further)[WARM_UP:]
                seconds[name] = _step_seconds([row for row in rows if row["train/epoch"] > 1.0])
                generations[where] = rows[-1].get("refine/generations", 0.0)
    return {
        "ratio": seconds["own_kernel"] / seconds["own_none"],
        "shared_ratio": seconds["shared_kernel"] / seconds["shared_none"],
        **{f"{name}_seconds": value for name, value in seconds.items()},
        **{f"{where}_generations": count for where, count in generations.items()},
    }


def encoding_share(config_file: Path, *, passes: int) -> float:
    """What a clip takes that is encoded again, by what it takes in a training step without the bank.

    One worker encodes the whole split once a window. A run of plain steps goes before that.

    Args:
        config_file: the run; its test split is trained on.
        passes: that are measured.
    """
    steps, alone = (WARM_UP + passes) * WINDOW, {"cluster.num_workers": 1}
    config = bench_config(config_file, Path(), "corpus", steps, False, alone).anchored()
    clips = ShardList.load(config.data.test).clips
    every = WINDOW * config.global_batch_size / clips  # epochs
    with tempfile.TemporaryDirectory() as folder:
        plain = _windows(config_file, folder, "plain", steps, False, alone)[WARM_UP:]
        again = alone | {"refine.strategy": "reencode", "refine.every": every}
        encoding = _windows(config_file, folder, "encoding", steps, True, again)[WARM_UP:]
    taken = statistics.median(row["time/reencode"] for row in encoding) * WINDOW / clips
    return taken * config.global_batch_size / _step_seconds(plain)


def _windows(
    config_file: Path, folder: str, name: str, steps: int, knowledge: bool, further: dict[str, Any], filled: int = 0
) -> list[dict[str, float]]:
    """All windows of one run on the test split, whose bank is given `filled` rows besides."""
    config = bench_config(config_file, Path(folder), name, steps, knowledge, further).anchored()
    tree = config.model_dump()
    tree["data"] |= {"train": config.data.test, "test": None}
    config = Config.model_validate(tree)
    shards, quiet = run.check_data(config), Console(quiet=True)
    run.prepare_folder(config, shards["train"], quiet, resume=False, overwrite=False)
    with cluster.session(dashboard=False):
        cluster.check_resources(config)
        actors = cluster.start_actors(config, run.steps_per_epoch(config, shards["train"]))
        try:
            with _filling(config, BankService(actors.bank), filled) if filled else nullcontext():
                run.fit(config, actors, shards["train"], quiet)
        finally:
            cluster.stop_actors(actors)
    batch = config.global_batch_size
    return [row | {"step_seconds": batch / row["train/samples_per_second"]} for row in windows(config)]


@contextmanager
def _filling(config: Config, bank: BankService, rows: int) -> Iterator[None]:
    """Rows are written beside the run as soon as it trains: it begins with an empty bank."""
    over = threading.Event()

    def fill() -> None:
        while not (config.run_dir / "metrics.jsonl").is_file():
            if over.wait(LOOK_SECONDS):
                return
        client = BankClient(bank, deterministic=True)  # waits for each, so that the run's own calls get their turns
        for chunk in clustered(rows, config.model.embedding_dim, first=FIRST_ID):
            if over.is_set():
                return
            client.upsert(*chunk, None, 0)

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        yield
    finally:
        over.set()
        filler.join()


def _step_seconds(rows: Sequence[dict[str, float]]) -> float:
    return statistics.median(row["step_seconds"] for row in rows)
