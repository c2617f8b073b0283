"""A bare PyTorch loop over the trainer's own batches: what a user would write without this package."""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.data.captions import captions
from ask_dist.data.loader import TrainLoader
from ask_dist.data.shards import ShardList
from ask_dist.models.text import Vocabulary
from ask_dist.train import start
from ask_dist.train.precision import AUTOCAST
from ask_dist.train.profiling import memory


def bare_loop(config: Config, window: int) -> tuple[list[float], float]:
    """InfoNCE under DistributedDataParallel, in autocast where the configuration's precision is a half one.

    Same model, data, global batch, workers, threads and device as a run of the configuration, on this machine.

    Args:
        config: of a run without knowledge.
        window: steps a measurement.

    Returns:
        Samples/s of each window, and the peak of rank 0's memory in GiB: of tensors on a GPU, else of the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = config.cluster.num_workers
        mp.spawn(_worker, args=(workers, config.model_dump(mode="json"), folder, window), nprocs=workers)
        rates, peak = json.loads((Path(folder) / "measured.json").read_text())
    return rates, peak


def _worker(rank: int, world_size: int, tree: dict[str, Any], folder: str, window: int) -> None:
    config = configuration.parse(tree)
    on_gpu = torch.cuda.is_available() and config.cluster.use_gpu is not False
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    shards, settings = ShardList.load(config.data.train), config.optimization
    model = start.new_model(config, Vocabulary.train(captions(shards, 10_000), config.model.text.vocabulary)).to(device)
    wrapped = DistributedDataParallel(model.train())
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate)
    loader = TrainLoader(
        shards,
        rank=rank,
        world_size=world_size,
        local_batch_size=settings.local_batch_size(world_size),
        seed=config.seed,
        sample_rate=config.data.sample_rate,
        clip_seconds=config.data.clip_seconds,
        lanes=config.data.lanes,
        shuffle_window=config.data.shuffle_window,
        tokenize=model.text.portable_tokenize(),
    )
    half = AUTOCAST.get(settings.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    rates, since = [], time.monotonic()
    for step, batch in zip(range(1, (settings.max_steps or 1) + 1), loader.batches(), strict=False):
        with torch.autocast(device.type, half) if half else nullcontext():
            features = wrapped(*(rows.to(device, non_blocking=True) for rows in (batch.audio, batch.tokens)))
        audio, text, scale = features[:3]
        all_audio, all_text = torch.cat(all_gather(audio)), torch.cat(all_gather(text))
        target = torch.arange(len(audio), device=device) + rank * len(audio)
        loss = cross_entropy(scale * audio @ all_text.T, target) + cross_entropy(scale * text @ all_audio.T, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, settings.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        if step % window == 0:
            rates.append(window * len(audio) * world_size / (time.monotonic() - since))
            since = time.monotonic()
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps([rates, peak_gib(memory(device))]))
    dist.destroy_process_group()


def peak_gib(sizes: dict[str, float]) -> float:
    """Of `memory`: what tensors took at most on a GPU, or what the process took."""
    return sizes.get("memory/peak_gib", sizes["memory/peak_rss_gib"])
