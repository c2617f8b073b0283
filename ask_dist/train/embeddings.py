"""Vectors of frozen towers, computed once a shard and kept on disk: a step then decodes nothing and runs no such tower.

They lie in `.embeddings/` beside the run's folder, which all workers share: a folder a tower, a file a shard. Where
they are more than `data.cache_gib` in all, towers that no run uses are removed, those used longest ago first.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ask_dist.config import Config
from ask_dist.data import audio as sounds
from ask_dist.data.audio import BadSample, fit_length, in_samples, own_length
from ask_dist.data.cache import file_sha256
from ask_dist.data.lanes import NO_ID
from ask_dist.data.leaks import HeldOut
from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.samples import Raw, open_clip, open_description, read_clips, read_shard
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.errors import InputError
from ask_dist.files import aside_of, write_atomically, writing
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.frozen import encoder_digest

# Raise it when the same towers and clips come to give other vectors, for example by another front end, or other
# verdicts of fingerprints.
VERSION = 1
FOLDER = ".embeddings"
LOCK = "in-use"  # in a tower's folder, locked by the runs that use it
log = logging.getLogger(__name__)

# Of a shard: ids and vectors of what could be encoded, and the reason by key of what could not.
Encoded = tuple[list[int], list[Tensor], dict[str, str]]


class Vectors:
    """One tower's vectors by id, out of the files of `cached_embeddings`; they are mapped, not read into memory.

    Args:
        files: one a shard.
        lock: what keeps them from being removed as long as these vectors live.

    Attributes:
        bad: reasons by key, of clips that could not be encoded.
    """

    def __init__(self, files: Sequence[Path], lock: IO[bytes]) -> None:
        self._lock = lock
        parts = [_load(path) for path in files]
        self._parts = [vectors for _, vectors, _ in parts]
        self.bad = {key: reason for _, _, bad in parts for key, reason in bad.items()}
        counts = [len(ids) for ids, _, _ in parts]
        self._ids, first = np.unique(np.concatenate([ids for ids, _, _ in parts]), return_index=True)
        self._part = np.repeat(np.arange(len(parts)), counts)[first]
        self._row = np.concatenate([np.arange(count) for count in counts])[first]

    def rows(self, ids: np.ndarray) -> Tensor:
        """float32 [n, width] of int64 [n]; zeros where the id is NO_ID.

        Raises:
            InputError: an id was not in the shards when they were encoded.
        """
        places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        wanted = ids != NO_ID
        if (self._ids[places] != ids)[wanted].any():
            raise InputError(
                "a shard is no longer what was packed: data.cache_embeddings has no vector of one of its clips; "
                "pack it again"
            )
        rows = torch.zeros(len(ids), self._parts[0].shape[1])
        for number in np.flatnonzero(wanted):
            rows[number] = self._parts[self._part[places[number]]][self._row[places[number]]]
        return rows


@dataclass(frozen=True)
class Embeddings:
    """The cached vectors of a run's frozen towers; None for a tower that every step runs."""

    audio: Vectors | None = None
    text: Vectors | None = None

    def feed(self, model: DualEncoder, loader: TrainLoader) -> None:
        """From now on the model takes, and the loader leaves out, what is cached."""
        model.given = frozenset(name for name in ("audio", "text") if getattr(self, name) is not None)
        if self.audio is not None:
            loader.leave_out_sounds(self.audio.bad)
        if self.text is not None:
            loader.leave_out_tokens()

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the model's `forward` takes for a batch; vectors on the CPU, zeros for invalid rows."""
        audio = batch.audio if self.audio is None else self.audio.rows(batch.ids.numpy())
        lengths = () if batch.lengths is None else (batch.lengths,)
        if self.text is None:
            return audio, batch.tokens, *lengths
        ids = np.array([stable_id(caption) for caption in batch.captions], np.int64)
        return audio, self.text.rows(np.where(batch.valid.numpy(), ids, NO_ID)), *lengths


def cached_embeddings(
    config: Config,
    model: DualEncoder,
    shards: ShardList,
    held_out: HeldOut | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Embeddings:
    """Encodes by every frozen tower what is not on disk yet. A collective: each rank takes its share of the shards.

    Args:
        config: the run; its output_dir is the same on all ranks.
        model: on the device to compute on, with the weights that the run trains with.
        shards: the training split.
        held_out: clips whose fingerprints no sound may have; one that has gets no vector.
        rank, world_size: which share.

    Raises:
        InputError: a shard is not what was packed, or a clip of a frozen audio tower is longer than data.clip_seconds.
        DiskError: the disk is full or can't be written.
    """
    found, root, held_out = {}, config.run_dir.parent / FOLDER, held_out or HeldOut()
    for name in ("audio", "text"):
        if getattr(config.model, name).freeze:
            folder = root / _digest(config, model, name, held_out)
            lock = _hold(folder)
            files = [folder / f"{digest}.safetensors" for digest in shards.sha256]
            for shard in range(rank, len(files), world_size):
                if not _readable(files[shard]):
                    log.info("encoding %s by the %s tower", shards.names[shard], name)
                    encode = partial(_encode_sounds, held_out=held_out) if name == "audio" else _encode_captions
                    _save(files[shard], encode(_whole(shards, shard), config, model))
            if world_size > 1:
                dist.barrier()
            found[name] = Vectors(files, lock)
    if rank == 0:
        _evict(root, config.data.cache_gib)
    return Embeddings(**found)


def refuse_long_clips(config: Config, shards: ShardList, chosen: Iterable[int]) -> None:
    """Raises InputError for a clip of the `chosen` shards that is longer than data.clip_seconds by its header."""
    for shard in chosen:
        for raw in read_clips(shards, shard, 0, shards.counts[shard]):
            with suppress(BadSample):
                _refuse_crop(raw, sounds.seconds(raw.sound), config)


def _refuse_crop(raw: Raw, seconds: float, config: Config) -> None:
    if seconds * config.data.sample_rate > round(config.data.clip_seconds * config.data.sample_rate):
        raise InputError(
            f"{raw.shard} {raw.key} has {seconds:.2f} s, over data.clip_seconds={config.data.clip_seconds:g}: it is "
            "cropped anew in each epoch, which data.cache_embeddings=true can't keep; raise the one or unset the other"
        )


def _digest(config: Config, model: DualEncoder, name: str, held_out: HeldOut) -> str:
    """Of all that a tower's vectors depend on beside the shard."""
    tower, data = getattr(model, name), config.data
    settings: dict[str, Any] = getattr(config.model, name).model_dump(mode="json", exclude={"source", "freeze"})
    settings |= {"version": VERSION, "kind": name}
    if name == "audio":
        settings |= {"clip": [data.sample_rate, data.clip_seconds, data.max_clip_seconds]}
        if data.length_step is not None:
            settings |= {"length_step": data.length_step}
        if held_out.fingerprints is not None:  # the files name the clips that were refused
            settings |= {"held_out": held_out.digest}
    more = json.dumps(settings, sort_keys=True).encode()
    return encoder_digest(tower, more, *tower.assets().values())[:24]


def _hold(folder: Path) -> IO[bytes]:
    """A lock on a tower's folder, made where it is missing: it is not removed until the file is closed."""
    while True:
        with writing(folder), suppress(FileNotFoundError):  # removed before it was locked
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / LOCK, "a+b")  # noqa: SIM115  (held for the length of the run)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
                os.utime(folder)
                return lock


def _evict(root: Path, gib: float) -> None:
    """Removes towers' folders that no run uses, those used longest ago first, until the others fit into the limit."""
    folders = []
    for folder in root.glob("[!.]*/"):
        with suppress(FileNotFoundError):  # another run was quicker
            size = sum(file.stat().st_size for file in folder.iterdir())
            folders.append((folder.stat().st_mtime, size, folder))
    excess = sum(size for _, size, _ in folders) - gib * 2**30
    for _, size, folder in sorted(folders):
        if excess > 0 and _removed(folder):
            log.info("removed %s: the cached vectors are more than data.cache_gib=%g", folder, gib)
            excess -= size


def _removed(folder: Path) -> bool:
    """Removes a tower's folder unless a run holds it."""
    with suppress(FileNotFoundError), open(folder / LOCK, "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        aside = folder.rename(aside_of(folder))  # whoever comes now makes a new one
        shutil.rmtree(aside)
    return True


def _whole(shards: ShardList, shard: int) -> Iterator[Raw]:
    """The clips of a shard that is known to be what was packed: what is kept of it counts for good."""
    try:
        with shards.at_hand(shard) as path:
            if file_sha256(path) != shards.sha256[shard]:
                raise BadSample("its SHA-256 is not that of sizes.json")
            yield from read_shard(path, 0, shards.counts[shard], shards.labels[shard])
    except (OSError, BadSample) as error:
        raise InputError(
            f"{shards.labels[shard]}: {error}; data.cache_embeddings=true needs whole shards: restore it or pack again"
        ) from None


@torch.no_grad()
def _encode_sounds(raws: Iterator[Raw], config: Config, model: DualEncoder, held_out: HeldOut) -> Encoded:
    data, device, bad = config.data, _device(model), {}
    samples, step = in_samples(data.sample_rate, data.clip_seconds, data.length_step)

    def clips() -> Iterator[tuple[int, np.ndarray, int]]:
        for raw in raws:
            if raw.problem:  # the loader meets it too
                continue
            try:
                audio, _ = open_clip(raw, data.sample_rate, data.max_clip_seconds)
                held_out.refuse_likeness(raw, audio, data.sample_rate)
            except BadSample as error:
                bad[raw.key] = str(error)
                continue
            _refuse_crop(raw, len(audio) / data.sample_rate, config)
            yield stable_id(raw.key), fit_length(audio, samples, None), own_length(len(audio), samples, step)

    ids: list[int] = []
    vectors: list[Tensor] = []
    stream = clips()
    while chunk := list(itertools.islice(stream, config.optimization.micro_batch_size)):
        clip_ids, waveforms, lengths = zip(*chunk, strict=True)
        ids += clip_ids
        audio = torch.from_numpy(np.stack(waveforms)).to(device)
        own = torch.tensor(lengths) if step else None
        vectors.append(model.audio.by_length(audio, own).float().cpu())
    return ids, vectors or [torch.zeros(0, model.audio.output_dim)], bad


@torch.no_grad()
def _encode_captions(raws: Iterator[Raw], config: Config, model: DualEncoder) -> Encoded:
    captions: dict[str, int] = {}
    for raw in raws:
        with suppress(BadSample):  # the loader names it
            captions |= {caption: stable_id(caption) for caption in open_description(raw)["captions"]}
    vectors = [torch.zeros(0, model.text.output_dim)]
    words = iter(captions)
    while chunk := list(itertools.islice(words, config.optimization.micro_batch_size)):
        vectors.append(model.text(model.text.tokenize(chunk).to(_device(model))).float().cpu())
    return list(captions.values()), vectors, {}


def _device(model: DualEncoder) -> torch.device:
    return model.log_logit_scale.device


def _save(path: Path, encoded: Encoded) -> None:
    ids, vectors, bad = encoded
    content = save(
        {"ids": torch.tensor(ids, dtype=torch.int64), "vectors": torch.cat(vectors)}, {"bad": json.dumps(bad)}
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def _load(path: Path) -> tuple[np.ndarray, Tensor, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        bad = json.loads(file.metadata()["bad"])
        return file.get_tensor("ids").numpy(), file.get_tensor("vectors"), bad


def _readable(path: Path) -> bool:
    try:
        _load(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    return True
