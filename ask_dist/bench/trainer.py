"""How fast a whole training run is beside a bare PyTorch DDP loop, and what the knowledge costs a step."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.data.captions import captions
from ask_dist.data.loader import TrainLoader
from ask_dist.data.shards import ShardList
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train import run

WINDOW = 10  # steps a measurement
WARM_UP = 3  # windows left out: caches fill, lanes are read for the first time


def trainer_figures(config_file: Path, steps: int = 160, rounds: int = 2) -> dict[str, dict[str, float]]:
    """Runs the trainer without knowledge, the trainer with it, and a bare DDP loop in turns, and compares medians.

    All three have the same model, data, batches, workers and threads. Figures of the trainer with knowledge are taken
    from its second epoch on: a pair's neighbours can be asked for once the bank holds it.

    Args:
        config_file: the run; its corpus should have about as many batches as `steps`.
        steps: of each run; those with knowledge are twice as long.
        rounds: runs of each.

    Returns:
        `trainer_vs_ddp` (samples/s of the trainer without knowledge by those of the loop) and
        `knowledge_step_vs_plain` (seconds of a step with knowledge by those of one without), each with its parts.
    """
    rates: dict[str, list[float]] = {"plain": [], "knowledge": [], "ddp": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in ("plain", "knowledge"):
                knowledge = name == "knowledge"
                config = bench_config(config_file, Path(folder), f"{name}_{number}", steps * (1 + knowledge), knowledge)
                rates[name] += _trainer_rates(config)
            rates["ddp"] += ddp_rates(bench_config(config_file, Path(folder), "ddp", steps, False))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "trainer_vs_ddp": {
            "trainer": medians["plain"],
            "ddp": medians["ddp"],
            "ratio": medians["plain"] / medians["ddp"],
        },
        "knowledge_step_vs_plain": {
            "knowledge": 1.0 / medians["knowledge"],
            "plain": 1.0 / medians["plain"],
            "ratio": medians["plain"] / medians["knowledge"],
        },
    }


def bench_config(
    file: Path, folder: Path, name: str, steps: int, knowledge: bool, further: dict[str, object] | None = None
) -> Config:
    """A run of so many steps below `folder` that does nothing but train; `further` settings win."""
    overrides: dict[str, object] = {
        "name": name,
        "output_dir": folder,
        "data.validation": "null",
        "optimization.epochs": 1000,
        "optimization.max_steps": steps,
        "optimization.log_every": WINDOW,
        "optimization.checkpoint_every": 1000,
        "knowledge.enabled": str(knowledge).lower(),
        "knowledge.start": 0.0,
        "knowledge.reliability.start": 0.0,
        "cluster.dashboard": "false",
        **(further or {}),
    }
    return configuration.load(file, [f"{key}={value}" for key, value in overrides.items()])


def _trainer_rates(config: Config) -> list[float]:
    run.train(config, console=Console(quiet=True))
    measured = windows(config)
    if config.knowledge.enabled:
        # The first of them is a window that began without.
        measured = [row for row in measured if row["train/knowledge_used"] == 1.0][1:]
    return [row["train/samples_per_second"] for row in measured]


def windows(config: Config) -> list[dict[str, float]]:
    """The rows of a run's metrics that each stand for a whole window, without those in which it warmed up."""
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/samples_per_second" in row and row["step"] % WINDOW == 0][WARM_UP:]


def ddp_rates(config: Config) -> list[float]:
    """Samples/s of each window of a bare DDP loop over the same batches."""
    with tempfile.TemporaryDirectory() as folder:
        workers = config.cluster.num_workers
        mp.spawn(_ddp_worker, args=(workers, config.model_dump(mode="json"), folder), nprocs=workers)
        return json.loads((Path(folder) / "rates.json").read_text())


def _ddp_worker(rank: int, world_size: int, tree: dict, folder: str) -> None:
    config = configuration.parse(tree)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    shards = ShardList.load(config.data.train)
    model = build_dual_encoder(
        config.model, config.data.sample_rate, Vocabulary.train(captions(shards, 10_000), config.model.text.vocabulary)
    )
    tokenize = model.text.tokenize
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimization.learning_rate)
    loader = TrainLoader(
        shards,
        rank=rank,
        world_size=world_size,
        local_batch_size=config.optimization.local_batch_size(world_size),
        seed=config.seed,
        sample_rate=config.data.sample_rate,
        clip_seconds=config.data.clip_seconds,
        lanes=config.data.lanes,
        shuffle_window=config.data.shuffle_window,
    )
    rates, start = [], time.monotonic()
    for step, batch in zip(range(1, (config.optimization.max_steps or 1) + 1), loader.batches(), strict=False):
        audio, text, scale = wrapped(batch.audio, tokenize(batch.captions))
        all_audio, all_text = torch.cat(all_gather(audio)), torch.cat(all_gather(text))
        target = torch.arange(len(audio)) + rank * len(audio)
        loss = cross_entropy(scale * audio @ all_text.T, target) + cross_entropy(scale * text @ all_audio.T, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimization.gradient_clip)
        optimizer.step()
        if step % WINDOW == 0:
            rates.append(WINDOW * len(audio) * world_size / (time.monotonic() - start))
            start = time.monotonic()
    if rank == 0:
        (Path(folder) / "rates.json").write_text(json.dumps(rates[WARM_UP:]))
    dist.destroy_process_group()
