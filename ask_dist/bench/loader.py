"""How fast the training loader is beside those of others on the same shards, and how soon a large corpus starts."""

from __future__ import annotations

import io
import itertools
import json
import mmap
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
import webdataset

from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.order import Order
from ask_dist.data.shards import FORMAT, SIZES, ShardList, read_sizes
from ask_dist.processor import use_cpu

BATCH = 32


def loader_vs_webdataset(shards_folder: Path, rounds: int = 15, processes: int = 0) -> dict[str, float]:
    """Against plain WebDataset, which reads the tars in order and decodes JSON and FLAC, no more.

    Args:
        shards_folder: clips of one length.
        rounds: epochs of each.
        processes: that decode, for both; WebDataset's also stack, as batches travel faster than samples.

    Returns:
        Medians over the rounds: "loader" and "webdataset" in samples/s, and the "ratio" of the two in a round.
    """
    shards = ShardList.load(shards_folder)
    if not processes:
        return _side_by_side("webdataset", lambda: _read_with_webdataset(shards), shards, rounds)
    stream = _webdataset_stream(shards, processes)
    read = partial(_samples_of, stream, shards.clips)
    return _side_by_side("webdataset", read, shards, rounds, processes)


def loader_vs_open_clip(shards_folder: Path, rounds: int = 15) -> dict[str, float] | dict[str, str]:
    """Against the pipeline that open_clip trains audio models with: it shuffles, decodes, crops or fills, and stacks.

    Its captions are not tokenized, as ours are not. It decodes with the library that we decode with: its own way needs
    FFmpeg's libraries. A released package (3.3.0 is the last) has no such pipeline, its repository has.

    Returns:
        As `loader_vs_webdataset`, with "open_clip" for the other; where that is not installed what is "missing".
    """
    try:
        from open_clip_train import audio_data, params
    except ImportError as error:
        return {"missing": f"open_clip's audio pipeline ({error}); docs/results.md says how to install it"}
    from open_clip.audio.transform import audio_transform_v2

    shards = ShardList.load(shards_folder)
    rate = read_sizes(shards_folder)["sample_rate"]
    arguments = params.parse_args(["--batch-size", str(BATCH), "--workers", "0", "--seed", "0"])
    arguments.train_data = "::".join(str(path.absolute()) for path in shards.paths)
    arguments.train_num_samples, arguments.world_size = shards.clips, 1
    audio_data._decode_audio_bytes = _decode_flac
    clip = {"sample_rate": rate, "clip_samples": round(shards.seconds / shards.clips * rate)}
    data = audio_data.get_wds_audio_dataset(
        arguments, audio_transform_v2(clip, is_train=True), is_train=True, tokenizer=lambda _: torch.zeros(1, 1)
    )
    return _side_by_side("open_clip", lambda: sum(len(batch["text"]) for batch in data.dataloader), shards, rounds)


def _side_by_side(
    other: str, read: Callable[[], int], shards: ShardList, rounds: int, processes: int = 0
) -> dict[str, float]:
    """Read an epoch a round with each, in turns.

    The loader shuffles, checks, crops and stacks; its epochs come out of one running stream, as in training.

    Args:
        other: the yardstick's name.
        read: reads an epoch with it and gives the samples read.
        processes: that decode for the loader; 0: its thread does.
    """
    use_cpu(1)  # as a worker does, whose thread reads
    loader = TrainLoader(
        shards,
        rank=0,
        world_size=1,
        local_batch_size=BATCH,
        seed=0,
        sample_rate=read_sizes(shards.paths[0].parent)["sample_rate"],
        clip_seconds=shards.seconds / shards.clips,
        processes=processes,
    )
    batches = loader.batches()
    rates: dict[str, list[float]] = {"loader": [], other: []}
    for round_number in range(rounds):
        for name in sorted(rates, reverse=bool(round_number % 2)):
            # The loader's thread works ahead: let it finish before the other's turn, and take that away before its own.
            time.sleep(0.5)
            if name == "loader":
                list(itertools.islice(batches, 3))
            start = time.perf_counter()
            samples = _take(batches, loader.steps_per_epoch) if name == "loader" else read()
            rates[name].append(samples / (time.perf_counter() - start))
    batches.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # Of two turns side by side: the speed of a machine changes more between rounds than the two differ.
    ratio = statistics.median(mine / its for mine, its in zip(rates["loader"], rates[other], strict=True))
    return {**medians, "ratio": ratio}


def _take(batches: Iterator[Batch], steps: int) -> int:
    samples = 0
    for batch in itertools.islice(batches, steps):
        _look_at(batch.audio)
        samples += int(batch.valid.sum())
    return samples


def _look_at(audio: torch.Tensor) -> None:
    """Reads a value of each page of memory: a batch that came from another process is not here before."""
    audio.flatten()[:: mmap.PAGESIZE // audio.element_size()].sum()


def _read_with_webdataset(shards: ShardList) -> int:
    dataset = webdataset.WebDataset([str(path.absolute()) for path in shards.paths], shardshuffle=False).map(_decode)
    return sum(1 for _ in dataset)


def _webdataset_stream(shards: ShardList, processes: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches without end, of processes that run on from epoch to epoch, as the loader's do."""
    paths = [str(path.absolute()) for path in shards.paths]
    dataset = webdataset.WebDataset(paths, shardshuffle=False).map(_decode_tensor).batched(BATCH).repeat()
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=processes))


def _samples_of(stream: Iterator[tuple[torch.Tensor, ...]], least: int) -> int:
    samples = 0
    while samples < least:
        audio, _ = next(stream)
        _look_at(audio)
        samples += len(audio)
    return samples


def _decode_tensor(sample: dict[str, bytes]) -> tuple[torch.Tensor, str]:
    (audio, _), described = _decode(sample)
    return torch.from_numpy(audio), described["captions"][0]


def _decode(sample: dict[str, bytes]) -> tuple[tuple[np.ndarray, int], dict[str, Any]]:
    return soundfile.read(io.BytesIO(sample["flac"]), dtype="float32"), json.loads(sample["json"])


def _decode_flac(content: bytes) -> tuple[torch.Tensor, int]:
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


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
