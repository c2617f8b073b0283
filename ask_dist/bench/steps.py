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
from ask_dist.bench import turns
from ask_dist.bench.rows import clustered
from ask_dist.bench.train import LEARNING
from ask_dist.bench.trainer import WARM_UP, WINDOW, bench_config, windows
from ask_dist.config import Config
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.train import run
from ask_dist.train.loop import train_loop_per_worker

FIRST_ID = 2**40  # of the rows that are put in beside the run's own: no clip's
LOOK_SECONDS = 0.2
TURN = WINDOW + 1  # steps, of which the first does not count


def knowledge_step_100k(
    config_file: Path,
    *,
    rows: int = 100_000,
    index: str = "ivf_flat",
    steps: int = 1320,
    turn: int = TURN,
    workers: int = 1,
    further: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Steps with knowledge out of a large bank against plain ones, in turns of a run whose bank has its own core.

    The bank has a refiner with a tenth of a core, as configured by default, which goes on while steps are plain, and is
    filled with clustered rows once the run has begun. Only turns count in which it holds all of them, with its index
    trained. All threads of a worker, those that read and decode too, share the core that is left to it.

    Args:
        config_file: the run; its test split is trained on.
        rows, index: that the bank is filled with, and its kind.
        steps: of the run. turn: of each turn.
        workers: of the run, a core each.
        further: settings of the run.

    Returns:
        As `turns.compared`; `late_share`, of the counted steps with knowledge those whose answer was late; and as
        `more_...` what each stage of such a step takes beyond a plain one's, in seconds.

    Raises:
        InputError: the run was over before the bank was ready.
    """
    settings = {"cluster.num_workers": workers, "cluster.bank_cpus": 1, "bank.index": index, "bank.inverted_from": rows}
    settings |= {"optimization.log_every": turn, **(further or {})}
    with tempfile.TemporaryDirectory() as folder:
        found = turns.pairs(_windows(config_file, folder, "knowledge", steps, True, settings, rows, "knowledge"))
    wanted = ("bank/rows",) if index == "flat" else ("bank/rows", "bank/inverted_rows")
    # What a turn says of the bank may be as old as the turn before: one more than those that say so is left out.
    ready = [(off, on) for off, on in found if all(on.get(name, 0.0) >= rows for name in wanted)][1:]
    if not ready:
        raise InputError(f"{steps} steps were over before {rows} rows in a trained {index} were used: take more steps")
    late = 1.0 - statistics.mean(on["train/knowledge_used"] for _, on in ready)
    stages = [name for name in ready[-1][1] if name.startswith("time/")]
    more = {
        name.replace("time/", "more_"): statistics.median(on[name] - off.get(name, 0.0) for off, on in ready)
        for name in stages
    }
    return turns.compared(ready) | {"late_share": late, "rows": rows, "workers": workers} | more


def knowledge_step_100k_pretrained(
    config_file: Path, *, steps: int = 150, turn: int = 5, **sizes: Any
) -> dict[str, float]:
    """As `knowledge_step_100k`, with encoders as they are trained in earnest: both towers of this run learn. A step
    takes seconds, so that few will do."""
    return knowledge_step_100k(config_file, steps=steps, turn=turn, further=LEARNING, **sizes)


def refiner_slowdown(
    config_file: Path, *, steps: int = 800, turn: int = 80, workers: Sequence[int] = (1, 2)
) -> dict[str, float]:
    """Steps beside a refiner against those beside a stopped one, in turns: on a core of its own, and on the workers'.

    Turns count from the second epoch on, in which the refiner has re-encoded rows to learn from. In its turns it takes
    somewhat more than its share, since its rests go on while it is stopped.

    Args:
        config_file: the run; its test split is trained on.
        steps: of each run. turn: of each turn.
        workers: of the run that leaves a core to the refiner, and of that in which `refine.cpu_share` alone bounds it.

    Returns:
        As `turns.compared`, of shared cores as `shared_...` too, and the generations that were committed.
    """
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for prefix, count, cores in (("", workers[0], 1), ("shared_", workers[1], 0)):
            settings = {"cluster.num_workers": count, "cluster.refine_cpus": cores, "optimization.log_every": turn}
            rows = _windows(config_file, folder, f"{prefix}run", steps, True, settings, switched="refiner")
            found = [(off, on) for off, on in turns.pairs(rows) if off["train/epoch"] > 1.0]
            figures |= {f"{prefix}{name}": value for name, value in turns.compared(found).items()}
            figures[f"{prefix}generations"] = rows[-1].get("refine/generations", 0.0)
    return figures


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
    config_file: Path,
    folder: str,
    name: str,
    steps: int,
    knowledge: bool,
    further: dict[str, Any],
    filled: int = 0,
    switched: turns.Switched | None = None,
) -> list[dict[str, float]]:
    """All windows of one run on the test split, whose bank is given `filled` rows besides; or all turns of it."""
    config = bench_config(config_file, Path(folder), name, steps, knowledge, further).anchored()
    tree = config.model_dump()
    tree["data"] |= {"train": config.data.test, "test": None}
    config = Config.model_validate(tree)
    shards, quiet = run.check_data(config), Console(quiet=True)
    train_loop = turns.in_turns(switched) if switched else train_loop_per_worker
    run.prepare_folder(config, shards["train"], quiet, resume=False, overwrite=False)
    with cluster.session(dashboard=False):
        cluster.check_resources(config)
        actors = cluster.start_actors(config, run.steps_per_epoch(config, shards["train"]))
        try:
            with _filling(config, BankService(actors.bank), filled) if filled else nullcontext():
                run.fit(config, actors, shards["train"], quiet, train_loop=train_loop)
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
