"""How fast the training loader is beside plain WebDataset on the same shards."""

from __future__ import annotations

import io
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import soundfile
import webdataset

from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.shards import ShardList, read_sizes
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
