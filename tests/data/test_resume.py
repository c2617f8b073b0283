"""Runs that stop, change their size and go on; processes that die; epochs without end; very many shards."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import SIZES, Clip, ShardList

BATCH = 8
Rows = list[tuple[int, str, str, bytes]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, make_clip: Callable[..., Clip]) -> ShardList:
    """61 short clips in nine shards."""
    folder = tmp_path_factory.mktemp("small")
    write_shards((make_clip(number, 60) for number in range(61)), folder, "train", clips_per_shard=7)
    return ShardList.load(folder)


def rank_of(shards: ShardList, rank: int = 0, world_size: int = 1, **changes: Any) -> TrainLoader:
    options: dict[str, Any] = {"seed": 1, "sample_rate": 8000, "clip_seconds": 0.005, "lanes": 4, "shuffle_window": 16}
    options |= {"rank": rank, "world_size": world_size, "local_batch_size": BATCH // world_size}
    return TrainLoader(shards, **options | changes)


def rows(batches: Iterator[Batch] | list[Batch]) -> Rows:
    return [
        (int(batch.ids[place]), batch.keys[place], batch.captions[place], batch.audio[place].numpy().tobytes())
        for batch in batches
        for place in batch.valid.nonzero()[:, 0].tolist()
    ]


def steps(shards: ShardList, world_size: int, first: int, count: int, **changes: Any) -> list[Rows]:
    """What all ranks together see at each step."""
    streams = [rank_of(shards, rank, world_size, **changes).batches(first) for rank in range(world_size)]
    met = [rows([next(stream) for stream in streams]) for _ in range(count)]
    for stream in streams:
        stream.close()
    return met


def check_points(shards: ShardList, points: int, batches: int) -> None:
    """At each point the run is stopped, taken up by another number of ranks, and compared with one that never was."""
    rng = np.random.default_rng(0)
    starts = sorted(rng.integers(60, size=points).tolist())
    whole = steps(shards, 1, 0, starts[-1] + batches)
    lived: list[Rows] = []
    for start, following in itertools.zip_longest(starts, starts[1:]):
        now = steps(shards, int(rng.choice([1, 2, 4])), start, batches)
        assert now == whole[start : start + batches]
        lived += now[: batches if following is None else following - start]
    assert lived == whole[starts[0] :]
    per_epoch = rank_of(shards).steps_per_epoch
    for epoch in range(len(whole) // per_epoch):
        keys = [row[1] for step in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step]
        assert sorted(keys) == [f"clip-{number:03d}" for number in range(61)]  # none lost, none repeated


def test_runs_of_changing_size_resume_exactly(small: ShardList) -> None:
    check_points(small, points=8, batches=25)


@pytest.mark.slow
def test_fifty_points_of_resume_and_two_hundred_batches_each(small: ShardList) -> None:
    check_points(small, points=50, batches=200)


@pytest.mark.multiprocess
def test_a_killed_decoding_process_is_replaced_and_nothing_lost(small: ShardList) -> None:
    expected, drawn = steps(small, 1, 0, 40), torch.get_rng_state()
    source = rank_of(small, processes=2)
    stream = source.batches()
    met = [rows([next(stream)]) for _ in range(3)]
    victims = [child for child in psutil.Process().children(recursive=True) if _decodes(child)]
    assert victims
    os.kill(victims[0].pid, signal.SIGKILL)
    met += [rows([next(stream)]) for _ in range(37)]
    stream.close()
    assert met == expected
    assert torch.equal(torch.get_rng_state(), drawn)  # that of dropout, which a step seeds while the loader works


def _decodes(process: psutil.Process) -> bool:
    try:
        return any("forkserver" in part for part in process.cmdline()) and not process.children()
    except psutil.Error:
        return False


READING = """
import sys, time
from ask_dist.data.loader import TrainLoader
from ask_dist.data.shards import ShardList

batches = TrainLoader(ShardList.load(sys.argv[1]), rank=0, world_size=1, local_batch_size=8, seed=0, sample_rate=8000,
                      clip_seconds=1.0, shuffle_window=16, processes=2).batches()
next(batches)
print("reading", flush=True)
time.sleep(600)
"""


@pytest.mark.multiprocess
def test_decoding_processes_end_with_a_trainer_that_is_killed(small: ShardList) -> None:
    command = [sys.executable, "-c", READING, str(small.paths[0].parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "reading\n"
        started = psutil.Process(trainer.pid).children(recursive=True)
        assert len(started) >= 3  # two, and what started them
        trainer.kill()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []


EPOCHS = """
import itertools, json, sys
import psutil
from ask_dist.data.loader import TrainLoader
from ask_dist.data.shards import ShardList
from ask_dist.processor import use_cpu

use_cpu(1)
loader = TrainLoader(ShardList.load(sys.argv[1]), rank=0, world_size=1, local_batch_size=32, seed=0,
                     sample_rate=8000, clip_seconds=1.0, shuffle_window=16, processes=int(sys.argv[2]))
resident = []
batches = loader.batches()
for epoch in range(50):
    for batch in itertools.islice(batches, loader.steps_per_epoch):
        pass
    trainer = psutil.Process()
    processes = [trainer, *trainer.children(recursive=True)]
    resident.append(sum(process.memory_info().rss for process in processes))
batches.close()
print(json.dumps(resident))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [0, 2])
def test_memory_stays_flat_over_fifty_epochs(tmp_path: Path, make_clip: Callable[..., Clip], processes: int) -> None:
    write_shards((make_clip(number, 8000) for number in range(64)), tmp_path, "train", clips_per_shard=8)
    command = [sys.executable, "-c", EPOCHS, str(tmp_path), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    resident = json.loads(done.stdout)
    assert len(resident) == 50
    assert max(resident[1:]) <= 1.02 * resident[0]


START = (
    "import json, sys; from ask_dist.bench.loader import measure_start; print(json.dumps(measure_start(sys.argv[1])))"
)


@pytest.mark.multiprocess
def test_an_epoch_over_very_many_shards_starts_from_their_sizes_alone(tmp_path: Path) -> None:
    shard = {"clips": 250, "seconds": 1000.0}
    listed = {f"train-{number:06d}.tar": shard | {"sha256": f"{number:064x}"} for number in range(100_000)}
    (tmp_path / SIZES).write_text(json.dumps({"format": 1, "sample_rate": 16000, "shards": listed, "classes": {}}))
    command = [sys.executable, "-c", START, tmp_path.as_uri()]  # as a URL: not even their names are looked up
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    print(f"{figures['seconds']:.2f} s, {figures['mebibytes']:.0f} MiB")
    assert figures["shards"] == 100_000
    assert figures["mebibytes"] < 200
