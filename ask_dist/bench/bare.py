"""A bare PyTorch loop over the trainer's own batches: what a user would write without this package."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ask_dist import config as configuration
from ask_dist.config import Config, Optimization
from ask_dist.data.captions import captions
from ask_dist.data.loader import TrainLoader
from ask_dist.data.shards import ShardList
from ask_dist.models.text import Vocabulary
from ask_dist.train import start
from ask_dist.train.parameters import encoders
from ask_dist.train.precision import AUTOCAST
from ask_dist.train.profiling import memory
from ask_dist.train.recompute import recompute_blocks

Rows = tuple[Tensor, Tensor, Tensor]


class BareRun(NamedTuple):
    """What a bare loop did.

    Attributes:
        rates: samples/s of each window.
        peak_gib: peak of rank 0's memory: of tensors on a GPU, else of the process.
        loss: InfoNCE of rank 0's pairs in the last step, mean of both directions.
    """

    rates: list[float]
    peak_gib: float
    loss: float


def bare_loop(config: Config, window: int, alike: bool = False) -> BareRun:
    """InfoNCE under DistributedDataParallel, in autocast where the configuration's precision is a half one.

    Same model, data, global batch, workers, threads and device as a run of the configuration, on this machine.

    Args:
        config: of a run without knowledge.
        window: steps a measurement.
        alike: spare memory as the configuration does, by PyTorch's own means: ZeroRedundancyOptimizer for ZeRO 1,
            `fully_shard` for 2 and 3, GradCache's two passes where the batch is cut into chunks,
            `torch.utils.checkpoint`. Without, the loop is the plain one whatever the configuration says. Chunks go
            with ZeRO 0 and 1 alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = config.cluster.num_workers
        mp.spawn(_worker, args=(workers, config.model_dump(mode="json"), folder, window, alike), nprocs=workers)
        return BareRun(**json.loads((Path(folder) / "measured.json").read_text()))


def _worker(rank: int, world_size: int, tree: dict[str, Any], folder: str, window: int, alike: bool) -> None:
    config = configuration.parse(tree)
    on_gpu = config.cluster.use_gpu is not False and torch.cuda.device_count() >= world_size  # as a run decides it
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.manual_seed(config.seed)
    shards, settings = ShardList.load(config.data.train), config.optimization
    model = start.new_model(config, Vocabulary.train(captions(shards, 10_000), config.model.text.vocabulary)).to(device)
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
    wrapped, optimizer = _distributed(model.train(), settings, device, alike)
    local = settings.local_batch_size(world_size)
    chunk, half = settings.micro_batch_size if alike else local, AUTOCAST.get(settings.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    rates, since = [], time.monotonic()
    for step, batch in zip(range(1, (settings.max_steps or 1) + 1), loader.batches(), strict=False):
        inputs = [rows.to(device, non_blocking=True) for rows in (batch.audio, batch.tokens)]
        optimizer.zero_grad()
        loss = _gradients(partial(_embed, wrapped, half), wrapped, inputs, chunk, scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), settings.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        if step % window == 0:
            if on_gpu:  # which has only been told what to do so far
                torch.cuda.synchronize(device)
            rates.append(window * local * world_size / (time.monotonic() - since))
            since = time.monotonic()
    if rank == 0:
        found = BareRun(rates, peak_gib(memory(device)), float(loss) / 2.0)
        (Path(folder) / "measured.json").write_text(json.dumps(found._asdict()))
    dist.destroy_process_group()


def _distributed(
    model: nn.Module, settings: Optimization, device: torch.device, alike: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model on all ranks, and what moves its weights."""
    stage = settings.zero_stage if alike else 0
    if alike and settings.activation_checkpointing:
        recompute_blocks(model)
    if stage >= 2:
        shard = partial(
            fully_shard,
            mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
            reshard_after_forward=stage == 3,
        )
        for encoder in encoders(model).values():
            for block in encoder.tower_blocks():
                shard(block)
        shard(model)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if stage == 1:
        optimizer = ZeroRedundancyOptimizer(weights, torch.optim.AdamW, lr=settings.learning_rate)
    else:
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate)
    return (model if stage >= 2 else DistributedDataParallel(model)), optimizer


def _gradients(
    embed: Callable[..., Rows], model: nn.Module, inputs: list[Tensor], chunk: int, scaler: torch.amp.GradScaler
) -> Tensor:
    """A batch's loss and its backward pass; of more rows than a chunk by GradCache, each chunk embedded twice."""
    if len(inputs[0]) <= chunk:
        loss = _info_nce(*embed(*inputs))
        scaler.scale(loss).backward()
        return loss.detach()
    chunks = list(zip(*(rows.split(chunk) for rows in inputs), strict=True))
    with torch.no_grad():
        audio, text, scales = zip(*(embed(*part, seed=seed) for seed, part in enumerate(chunks)), strict=True)
    leaves = [rows.requires_grad_() for rows in (torch.cat(audio), torch.cat(text), scales[0].clone())]
    loss = _info_nce(*leaves)
    scaler.scale(loss).backward()
    gradients = zip(*(rows.grad.split(chunk) for rows in leaves[:2]), strict=True)
    for number, (part, wanted) in enumerate(zip(chunks, gradients, strict=True)):
        with nullcontext() if number == len(chunks) - 1 else model.no_sync():
            torch.autograd.backward(embed(*part, seed=number), (*wanted, leaves[2].grad / len(chunks)))
    return loss.detach()


def _embed(model: nn.Module, half: torch.dtype | None, *inputs: Tensor, seed: int | None = None) -> Rows:
    """Both towers' rows and the logit_scale; with a `seed` with the dropout that it draws."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.autocast(inputs[0].device.type, half) if half else nullcontext():
        audio, text, scale = model(*inputs)[:3]
    return audio, text, scale


def _info_nce(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    all_audio, all_text = torch.cat(all_gather(audio)), torch.cat(all_gather(text))
    target = torch.arange(len(audio), device=audio.device) + dist.get_rank() * len(audio)
    return cross_entropy(scale * audio @ all_text.T, target) + cross_entropy(scale * text @ all_audio.T, target)


def peak_gib(sizes: dict[str, float]) -> float:
    """Of `memory`: what tensors took at most on a GPU, or what the process took."""
    return sizes.get("memory/peak_gib", sizes["memory/peak_rss_gib"])
