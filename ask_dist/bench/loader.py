"""How fast the training loader is beside plain WebDataset on the same shards, and how soon a large corpus starts."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import soundfile
import webdataset

from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.order import Order
from ask_dist.data.shards import FORMAT, SIZES, ShardList, read_sizes
from ask_dist.processor import use_cpu

BATCH = 32


def loader_vs_webdataset(shards_folder: Path, rounds: int = 5) -> dict[str, float]:
    """Read an epoch a round with each, in turns, in one process without decoding processes.

    The yardstick reads the tars in order and decodes JSON and FLAC, no more. The loader also shuffles, checks, crops
    and stacks; its epochs come out of one running stream, as in training.

    Returns:
        Medians over the rounds: "loader" and "webdataset" in samples/s, and their "ratio".
    """
    use_cpu(1)  # as a worker does, whose thread reads
    shards = ShardList.load(shards_folder)
    loader = TrainLoader(
        shards,
        rank=0,
        world_size=1,
        micro_batch_size=BATCH,
        seed=0,
        sample_rate=read_sizes(shards_folder)["sample_rate"],
        clip_seconds=shards.seconds / shards.clips,
    )
    batches = loader.batches()
    rates: dict[str, list[float]] = {"loader": [], "webdataset": []}
    for round_number in range(rounds):
        for name in sorted(rates, reverse=bool(round_number % 2)):
            # The loader's thread works ahead: let it finish before the other's turn, and take that away before its own.
            time.sleep(0.5)
            if name == "loader":
                list(itertools.islice(batches, 3))
            start = time.perf_counter()
            samples = _take(batches, loader.steps_per_epoch) if name == "loader" else _read_with_webdataset(shards)
            rates[name].append(samples / (time.perf_counter() - start))
    batches.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "ratio": medians["loader"] / medians["webdataset"]}


def _take(batches: Iterator[Batch], steps: int) -> int:
    return sum(int(batch.valid.sum()) for batch in itertools.islice(batches, steps))


def _read_with_webdataset(shards: ShardList) -> int:
    dataset = webdataset.WebDataset([str(path.absolute()) for path in shards.paths], shardshuffle=False).map(_decode)
    return sum(1 for _ in dataset)


def _decode(sample: dict[str, bytes]) -> tuple[object, object]:
    return soundfile.read(io.BytesIO(sample["flac"]), dtype="float32"), json.loads(sample["json"])


def start_of_epoch(shards: int = 100_000) -> dict[str, float]:
    """From a folder's path to the first clip of each of eight lanes, in a process of its own; no shard is opened.

    Returns:
        "shards", "seconds", and "mebibytes" that the process grew by at its peak.
    """
    with TemporaryDirectory() as folder:
        listed = {}
        for number in range(shards):
            (Path(folder) / f"train-{number:06d}.tar").touch()
            listed[f"train-{number:06d}.tar"] = {"clips": 250, "seconds": 1000.0, "sha256": f"{number:064x}"}
        sizes = {"format": FORMAT, "sample_rate": 16000, "shards": listed, "classes": {}}
        (Path(folder) / SIZES).write_text(json.dumps(sizes))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(measure_start, Path(folder)).result()


def measure_start(folder: Path | str) -> dict[str, float]:
    """The figures of `start_of_epoch`, of this process."""
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    shards = ShardList.load(folder)
    order = Order(shards.counts, seed=0, lanes=8, per_lane=4, window=512)
    first = [next(order.pieces(1, *order.lane_bounds(lane))) for lane in range(order.lanes)]
    seconds = time.perf_counter() - start
    assert all(piece.clips for piece in first)
    return {"shards": len(shards.paths), "seconds": seconds, "mebibytes": (_peak_memory() - before) / 2**20}


def _peak_memory() -> int:
    """Bytes resident at most so far. Not getrusage's: that begins with what the parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
