"""What every training worker runs: fetch, forward, loss, backward, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.data.cache import cache_of
from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.quarantine import QUARANTINE
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.evaluate.encode import encode, gather_encoded, retrieval_results
from ask_dist.losses.objective import AskObjective
from ask_dist.models.lora import add_adapters
from ask_dist.models.saved import load_weights
from ask_dist.models.text import Vocabulary
from ask_dist.processor import use_cpu
from ask_dist.train import checkpoint, finish, start
from ask_dist.train.embeddings import cached_embeddings
from ask_dist.train.engine import Engine
from ask_dist.train.knowledge import KnowledgeSource, load_actors, refiner_state, save_bank
from ask_dist.train.profiling import FOLDER, TracingClock, memory
from ask_dist.train.reencode import is_due, reencode
from ask_dist.train.state import TrainState
from ask_dist.train.step import train_step
from ask_dist.train.trackers import feeds
from ask_dist.train.tracking import AUDIT, AuditLog, MetricsLog, StageClock, last_time

log = logging.getLogger(__name__)


def train_loop_per_worker(job: dict[str, Any]) -> None:
    """Trains from the last checkpoint, or from the start, to the end of the run.

    Args:
        job: `config` (plain mapping), `actors` (of `cluster.start_actors`), `use_gpu`, and `checkpoint` (path of the
            one that the run goes on from, or None).

    Raises:
        InputError: whatever the user can mend; a full disk too.
    """
    state = set_up(configuration.parse(job["config"]), job)
    train(state)
    finish.finish(state)


def set_up(config: Config, job: dict[str, Any]) -> TrainState:
    """Builds model, engine, loader and links to the actors; takes up the last checkpoint if there is one."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device() if job["use_gpu"] else torch.device("cpu")
    if device.type == "cpu" or config.optimization.offload != "none":  # Adam's update is then the host's
        use_cpu(config.cluster.cpus_per_worker)
    torch.manual_seed(config.seed)
    vocabulary = Vocabulary.load(config.run_dir / "model" / Vocabulary.FILE)
    shards = load_shards(config)
    held_out = start.held_out_clips(config, shards, rank, world_size)
    model = start.new_model(config, vocabulary)
    loader = TrainLoader(
        shards["train"],
        rank=rank,
        world_size=world_size,
        local_batch_size=config.optimization.local_batch_size(world_size),
        seed=config.seed,
        sample_rate=config.data.sample_rate,
        clip_seconds=config.data.clip_seconds,
        lanes=config.data.lanes,
        shuffle_window=config.data.shuffle_window,
        processes=config.data.loader_processes,
        max_bad_share=config.data.max_bad_share,
        max_clip_seconds=config.data.max_clip_seconds,
        quarantine=config.run_dir / QUARANTINE,
        held_out=held_out,
        tokenize=model.text.portable_tokenize(),
        length_step=config.data.length_step,
    )
    total_steps = run_length(config, loader.steps_per_epoch)
    if config.model.source is not None:
        load_weights(model, config.model.source)
    add_adapters(model, config.model)
    actors = job["actors"]
    knowledge = KnowledgeSource(config, actors, device, rank, world_size) if actors.bank else None
    metrics, tracing = config.run_dir / "metrics.jsonl", config.tracking.profile
    state = TrainState(
        config=config,
        rank=rank,
        world_size=world_size,
        engine=Engine(model, config.optimization, total_steps, device),
        objective=AskObjective(
            config.knowledge, config.knowledge.half_life * loader.steps_per_epoch, config.optimization.loss
        ),
        loader=loader,
        shards=shards,
        held_out=held_out,
        knowledge=knowledge,
        actors=actors,
        total_steps=total_steps,
        lineage=checkpoint.lineage(config, shards["train"].fingerprint),
        log=MetricsLog(metrics, last_time(metrics), feeds(config)) if rank == 0 else None,
        audit=AuditLog(config.run_dir / AUDIT) if config.data.audit and rank == 0 else None,
        clock=TracingClock(config.run_dir / FOLDER, device) if rank == 0 and tracing else StageClock(device),
    )
    start.name_unread(state)
    resume(state, job["checkpoint"])
    if config.data.cache_embeddings:  # the weights of frozen towers are now those of the checkpoint
        state.embeddings = cached_embeddings(config, state.engine.whole(), shards["train"], held_out, rank, world_size)
        state.embeddings.feed(state.engine.module, loader)
    return state


def load_shards(config: Config) -> dict[str, ShardList]:
    """The shard list of each split that the configuration names."""
    data, cache = config.data, cache_of(config)
    held_out = {"validation": data.validation, "test": data.test, "held_out": data.held_out}
    return {"train": ShardList.load(data.train, data.weights, cache)} | {
        split: ShardList.load(place, cache=cache) for split, place in held_out.items() if place is not None
    }


def run_length(config: Config, steps_per_epoch: int) -> int:
    """Global steps of the whole run."""
    steps = max(1, math.ceil(config.optimization.epochs * steps_per_epoch))
    return min(steps, config.optimization.max_steps or steps)


def train(state: TrainState) -> None:
    """The loop. The batch after the present one is always at hand, so that its neighbours can be asked for."""
    settings, epoch = state.config.optimization, state.loader.steps_per_epoch
    evaluate_every = max(1, round(settings.evaluate_every * epoch))
    checkpoint_every = max(1, round(settings.checkpoint_every * epoch))
    refine_every = max(1, round(state.config.refine.every * epoch))
    due, since, trained = False, time.monotonic(), np.zeros(2)  # pairs, and seconds of sound
    for batch, following in with_next(state.loader.batches(state.engine.global_step), state):
        values, *more = train_step(state, batch, following)
        trained += more
        step = state.engine.global_step
        last = step == state.total_steps
        if state.knowledge and step % refine_every == 0:
            if is_due(state.config, step, refine_every, state.total_steps):
                with state.clock("reencode"):
                    reencode(state)
            state.knowledge.refine()
        if step % settings.log_every == 0 or step == 1 or last:
            rates = trained / max(time.monotonic() - since, 1e-9)
            since, trained = time.monotonic(), np.zeros(2)
            log_step(state, values, *rates.tolist())
        if "validation" in state.shards and (step % evaluate_every == 0 or last):
            evaluate_validation(state)
            since, trained = time.monotonic(), np.zeros(2)
        due = due or step % checkpoint_every == 0
        if due and not last and not state.skipped_in_a_row:  # weights that give no numbers are nothing to go back to
            save_checkpoint(state)
            due = False
            since, trained = time.monotonic(), np.zeros(2)


def with_next(batches: Iterator[Batch], state: TrainState) -> Iterator[tuple[Batch, Batch]]:
    """Pairs of a batch and the one after it, up to the end of the run."""
    current = next(batches)
    while state.engine.global_step < state.total_steps:
        with state.clock("data"):
            following = next(batches)
        yield current, following
        current = following


def log_step(state: TrainState, values: dict[str, float], samples_per_second: float, sound_per_second: float) -> None:
    """Writes a row of metrics, on rank 0. Sound is in seconds."""
    stages = state.clock.take()
    if state.log is None:
        return
    extra = state.knowledge.metrics() if state.knowledge else {}
    row = values | state.diagnostics | stages | extra | memory(state.engine.device)
    row |= {
        "train/samples_per_second": samples_per_second,
        "train/audio_hours_per_second": sound_per_second / 3600,
        "train/samples_seen": float(state.samples_seen),
        "train/epoch": state.engine.global_step / state.loader.steps_per_epoch,
        "data/bad_samples": float(state.loader.bad.count),
    }
    state.log.log(row, state.engine.global_step)
    while state.knowledge and (problem := state.knowledge.take_problem()):
        state.log.warn(problem)


def evaluate_validation(state: TrainState) -> None:
    """Retrieval on the validation shards, by all ranks; logged, and reported to Ray (for Tune).

    Where no clip can be read (a store that is out of reach, say) the run keeps its older scores and goes on.
    """
    shards = state.shards["validation"]
    part = encode(state.engine.whole(), shards, state.config, state.rank, state.world_size)
    encoded = gather_encoded(part)
    bad = shards.clips - len(encoded.keys)
    if bad and state.rank == 0:
        kept = "" if encoded.keys else "; the older scores stay"
        log.warning("%d validation clips can't be used, the first: %s%s", bad, encoded.bad[0], kept)
    if not encoded.keys:
        return
    results = retrieval_results(encoded, state.shards["train"].classes, state.config.seed)
    state.scores = {"eval/validation/bad_samples": float(bad)} | {
        f"eval/validation/{direction}_{name}": value
        for direction in ("text_to_audio", "audio_to_text")
        for name, value in results[direction].items()
    }
    if state.log is not None:
        state.log.log(state.scores, state.engine.global_step)
    report(state)


def save_checkpoint(state: TrainState) -> None:
    """Engine, bank and refiner as they are now. A collective; rank 0 writes and tells Ray Train where.

    While the bank hangs there is none: the one before stays, and the next is tried when its time comes.
    """
    engine = state.engine.state()
    if state.rank != 0:
        report(state)
        return
    refiner, deterministic = state.actors.refiner, state.config.optimization.deterministic
    try:
        folder = checkpoint.write(
            state.config.run_dir,
            state.config.optimization.keep_checkpoints,
            engine=engine,
            arrays={"refiner": refiner_state(refiner, deterministic)} if refiner is not None else {},
            banks={name: partial(save_bank, primary) for name, primary in state.actors.primaries.items()},
            global_step=state.engine.global_step,
            samples_seen=state.samples_seen,
            skipped_steps=state.skipped_steps,
            lineage=state.lineage,
        )
    except ray.exceptions.GetTimeoutError:
        if state.log is not None:
            state.log.warn(
                f"no checkpoint at step {state.engine.global_step}, since the bank hangs: the last one stays"
            )
        report(state)
        return
    report(state, ray.train.Checkpoint.from_directory(folder))


def report(state: TrainState, saved: ray.train.Checkpoint | None = None) -> None:
    """Tells Ray Train the newest validation scores and, on rank 0, the newest checkpoint. A collective."""
    ray.train.report(
        state.scores | {"step": state.engine.global_step},
        checkpoint=saved,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,  # it lies in the run's folder already
    )


def resume(state: TrainState, checkpoint_path: str | None) -> None:
    """Takes up the run's last checkpoint: engine on every rank, bank and refiner by rank 0 for all.

    That is the last one that Ray Train was told of, if this group of workers replaces one that failed; else
    `checkpoint_path`, that of an earlier start. Without a checkpoint the actors are emptied: workers that were
    restarted begin anew, and rows of later steps would refuse theirs.
    """
    reported = ray.train.get_checkpoint()
    path = reported.path if reported is not None else checkpoint_path
    if path is not None:
        load_checkpoint(state, Path(path))
    elif state.rank == 0:
        load_actors(state.actors, None)
    dist.barrier()
    if path is None and state.config.bank.source is not None:
        start.encode_anchors(state)


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Puts a verified checkpoint into the engine of this rank and, on rank 0, into the actors."""
    try:
        manifest = checkpoint.load_manifest(folder, state.lineage)
    except checkpoint.DamagedCheckpoint as error:
        raise InputError(f"{error}; --resume goes on from the one before it") from None
    state.engine.load_state(checkpoint.load_engine(folder))
    state.samples_seen, state.skipped_steps = manifest.samples_seen, manifest.skipped_steps
    if state.rank == 0:
        load_actors(state.actors, folder)
