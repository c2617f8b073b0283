"""A dry run: everything that can be known before a job starts, and one step on synthetic data."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ask_dist import cluster
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.config import Config
from ask_dist.data.audio import in_samples
from ask_dist.data.captions import captions
from ask_dist.data.leaks import HeldOut, audit
from ask_dist.data.shards import ShardList, evenly
from ask_dist.errors import InputError
from ask_dist.losses.injection import Neighbours
from ask_dist.losses.objective import AskObjective
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.lora import add_adapters
from ask_dist.models.minilm import FolderTextEncoder
from ask_dist.models.text import Vocabulary
from ask_dist.train import loop
from ask_dist.train.embeddings import refuse_long_clips
from ask_dist.train.parameters import encoders
from ask_dist.train.precision import compute_in
from ask_dist.train.run import check_data, steps_per_epoch
from ask_dist.train.start import new_model

SAMPLE_CAPTIONS = 2000
LOOKED_INTO = 64  # training shards
SHOWN = 5  # warnings


def check(config: Config, console: Console) -> None:
    """Validates data, output folder and resources, prints what the run would do, and takes one step.

    Raises:
        InputError: the first thing that would stop the run.
    """
    config = config.anchored()
    shards = check_data(config)
    _check_writable(config.run_dir)
    gpu = _check_machine(config)
    console.print(_data_table(config, shards))
    chosen = _look_into(shards["train"], console)
    _audit(shards, chosen, console)
    if config.data.fingerprints:
        console.print("data.fingerprints: sounds are decoded and compared in the run, not here", highlight=False)
    if config.data.cache_embeddings and config.model.audio.freeze:
        refuse_long_clips(config, shards["train"], chosen)
    console.print(_resource_table(config, gpu))
    loss, seconds, parameters = synthetic_step(config, shards["train"])
    console.print(
        f"one synthetic step of {config.optimization.micro_batch_size} pairs on the CPU: loss {loss:.3f}, "
        f"{seconds:.2f} s, {parameters / 1e6:.2f} million parameters",
        highlight=False,
    )
    console.print("[green]ready[/]: ask-dist train would run", highlight=False)


def synthetic_step(config: Config, shards: ShardList) -> tuple[float, float, int]:
    """One forward, objective with knowledge, and backward on random sounds with captions of the corpus, in the
    run's precision.

    Returns:
        The loss, seconds taken, and the model's parameter count.

    Raises:
        InputError: the loss or a gradient is not finite, or weights that are to learn have none.
    """
    torch.manual_seed(config.seed)
    size = config.optimization.micro_batch_size
    sentences = list(captions(shards, SAMPLE_CAPTIONS))
    if not sentences:
        raise InputError(f"{config.data.train} has no readable caption; pack it again")
    vocabulary = Vocabulary.train(sentences, config.model.text.vocabulary)
    model = new_model(config, vocabulary)
    add_adapters(model, config.model)
    compute_in(model, config.optimization.precision, torch.device("cpu"))
    longest, shortest = in_samples(config.data.sample_rate, config.data.clip_seconds, config.data.length_step)
    audio = 0.1 * torch.randn(size, longest)
    lengths = torch.tensor([shortest, longest]).repeat(size)[:size] if shortest else None  # in turns
    tokens = model.text.tokenize([sentences[i % len(sentences)] for i in range(size)])
    start = time.perf_counter()
    features = model(audio, tokens, lengths)
    objective = AskObjective(config.knowledge, config.knowledge.half_life, config.optimization.loss)
    loss = objective(*features, torch.arange(size), neighbours=_synthetic_neighbours(config)).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not torch.isfinite(loss) or not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise InputError(f"the synthetic step gave loss {loss.item()}; lower optimization.learning_rate or use fp32")
    _refuse_idle(model)
    return loss.item(), time.perf_counter() - start, sum(p.numel() for p in model.parameters())


def _refuse_idle(model: DualEncoder) -> None:
    """Raises InputError where the step's gradient does not reach weights that are to learn."""
    may_idle: set[nn.Parameter] = set()
    for encoder in encoders(model).values():
        learns = any(parameter.grad is not None for parameter in encoder.parameters())
        # Frozen until later; or any network of transformers, which may have weights that captions' vectors do without.
        if encoder.held or (isinstance(encoder, FolderTextEncoder) and learns):
            may_idle |= {
                weights for name, weights in encoder.named_parameters() if encoder.held or ".lora_" not in name
            }
    idle = [
        name
        for name, weights in model.named_parameters()
        if weights.requires_grad and weights.grad is None and weights not in may_idle
    ]
    if idle:
        raise InputError(
            f"{len(idle)} weights that are to learn get no gradient, {idle[0]} among them; leave such layers out of "
            "lora.targets, and let an encoder of your own call requires_grad_(False) on what it does not use"
        )


def _synthetic_neighbours(config: Config) -> Neighbours:
    """The answer of a small bank of random rows."""
    dim, rows = config.model.embedding_dim, 256
    values = np.random.default_rng(config.seed).standard_normal((2, rows, dim)).astype(np.float32)
    values /= np.linalg.norm(values, axis=2, keepdims=True)
    bank = KnowledgeBank(dim, rows)
    bank.upsert(np.arange(rows), values[0], values[1], None, 0)
    # The batch's own pairs are the first rows of this bank.
    return Neighbours.of(bank.search_ids(np.arange(config.optimization.micro_batch_size), config.knowledge.neighbours))


def _look_into(train: ShardList, console: Console) -> list[int]:
    """The training shards that are looked into, by number: none behind URLs, and not all of very many."""
    if train.remote:
        return []
    chosen = evenly(len(train.paths), LOOKED_INTO)
    if len(chosen) < len(train.paths):
        console.print(
            f"{len(chosen)} of {len(train.paths)} training shards are looked into; all of them: in the run, and for "
            "repeated keys by ask-dist shards verify",
            highlight=False,
            soft_wrap=True,
        )
    return chosen


def _audit(shards: dict[str, ShardList], chosen: list[int], console: Console) -> None:
    """Names repeated keys and held-out clips in these training shards."""
    if not chosen:
        return
    with console.status("looking for repeated keys and held-out clips"):
        held_out = HeldOut.of(shards)
        found = audit(shards["train"], held_out, chosen)
    for warning in held_out.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    for record in found[:SHOWN]:
        line = escape(f"{record['shard']} {record['key']}: {record['reason']}")
        console.print(f"[yellow]warning:[/] {line}", highlight=False, soft_wrap=True)
    if len(found) > SHOWN:
        console.print(f"[yellow]warning:[/] and {len(found) - SHOWN} more like these", highlight=False)


def _check_writable(run_dir: Path) -> None:
    folder = run_dir
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{folder} is no folder that can be written; set output_dir=")


def _check_machine(config: Config) -> bool:
    """Resources against the cluster, or against this machine where none is named; whether workers get a GPU each."""
    if "RAY_ADDRESS" in os.environ:
        with cluster.session(dashboard=config.cluster.dashboard):
            cluster.check_resources(config)
            return cluster.use_gpu(config)
    present = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
    gpu = cluster.use_gpu(config, present["GPU"])
    asked = cluster.resources(config, gpu)["in all"]
    for name, amount in present.items():
        if asked[name] > amount:
            raise InputError(
                f"the run asks for {asked[name]:g} {name}, this machine has {amount}; lower cluster.num_workers, "
                "cpus_per_worker, gpus_per_worker or the actors' shares, or set RAY_ADDRESS to a cluster"
            )
    return gpu


def _data_table(config: Config, shards: dict[str, ShardList]) -> Table:
    table = Table("split", "shards", "clips", "hours", "classes", title="data", title_justify="left")
    for split, listed in shards.items():
        hours = f"{listed.seconds / 3600:.2f}"
        table.add_row(split, str(len(listed.paths)), str(listed.clips), hours, str(len(listed.classes)))
    epoch = steps_per_epoch(config, shards["train"])
    table.caption = (
        f"{config.cluster.num_workers} workers, global batch {config.global_batch_size}, {epoch} steps an epoch, "
        f"{loop.run_length(config, epoch)} steps in all"
    )
    return table


def _resource_table(config: Config, gpu: bool) -> Table:
    table = Table("part", "CPU", "GPU", title="resources", title_justify="left")
    for part, needs in cluster.resources(config, gpu).items():
        table.add_row(part, f"{needs['CPU']:g}", f"{needs['GPU']:g}")
    table.caption = "0 shares the workers' cores"
    return table
