"""A split through the model: each rank encodes its part, all get the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ask_dist.bank.prototypes import unit_rows
from ask_dist.config import Config
from ask_dist.data.leaks import HeldOut
from ask_dist.data.loader import EvalLoader
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.errors import InputError
from ask_dist.evaluate.long_tail import long_tail_metrics
from ask_dist.evaluate.retrieval import bootstrap_interval, ranks
from ask_dist.evaluate.search import IndexedClip, SearchIndex
from ask_dist.models.dual_encoder import DualEncoder

TEXTS = 64  # captions encoded at a time, where there is no audio


@dataclass
class Encoded:
    """A split as the model sees it.

    Attributes:
        audio_features: float32 [clips, dim]; text_features: float32 [texts, dim], unit rows on the CPU.
        owner: int64 [texts], the clip of each text.
        keys, captions, classes, shards, sounds and recordings (as in `loader.EvalBatch`): by clip.
        bad: records of the samples that were skipped.
    """

    audio_features: Tensor
    text_features: Tensor
    owner: Tensor
    keys: list[str]
    captions: list[list[str]]
    classes: list[list[str]]
    shards: list[str]
    sounds: list[bytes]
    recordings: list[str]
    bad: list[dict[str, str]]


@torch.no_grad()
def encode(
    model: DualEncoder,
    shards: ShardList,
    config: Config,
    rank: int,
    world_size: int,
    limit: int | None = None,
    held_out: HeldOut | None = None,
) -> Encoded:
    """Encodes this rank's part of a split with the model in evaluation mode, and leaves the mode as it was.

    Args:
        model: on the device to compute on.
        shards: the split.
        config: sample rate and clip length.
        rank, world_size: which part.
        limit: clips of the whole split at most.
        held_out: clips that are left out as bad samples.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    loader = EvalLoader(
        shards,
        rank=rank,
        world_size=world_size,
        batch_size=config.optimization.micro_batch_size,
        sample_rate=config.data.sample_rate,
        clip_seconds=config.data.clip_seconds,
        length_step=config.data.length_step,
        limit=limit,
        max_clip_seconds=config.data.max_clip_seconds,
        held_out=held_out,
    )
    dim = config.model.embedding_dim
    audio, text, counts = [torch.zeros(0, dim)], [torch.zeros(0, dim)], [0]
    encoded = Encoded(torch.zeros(0), torch.zeros(0), torch.zeros(0), [], [], [], [], [], [], [])
    for batch in loader.batches():
        audio.append(model.encode_audio(batch.audio.to(device), batch.lengths).cpu())
        flat = [caption for captions in batch.captions for caption in captions]
        text.append(model.encode_text(model.text.tokenize(flat).to(device)).cpu())
        counts += [len(captions) for captions in batch.captions]
        encoded.keys += batch.keys
        encoded.captions += batch.captions
        encoded.classes += batch.classes
        encoded.shards += batch.shards
        encoded.sounds += batch.sounds
        encoded.recordings += batch.recordings
    encoded.audio_features, encoded.text_features = torch.cat(audio), torch.cat(text)
    encoded.owner = torch.repeat_interleave(
        torch.arange(len(encoded.keys)), torch.tensor(counts[1:], dtype=torch.int64)
    )
    encoded.bad = list(loader.bad.records)
    model.train(was_training)
    return encoded


def paired_rows(encoded: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row a clip: ids int64 [n], audio, and the mean of its captions at unit length, float32 [n, dim] each."""
    ids = np.array([stable_id(key) for key in encoded.keys], np.int64)
    sums = torch.zeros_like(encoded.audio_features).index_add_(0, encoded.owner, encoded.text_features)
    return ids, encoded.audio_features.numpy(), unit_rows(sums.numpy())


def no_rows(dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """None at all, as `paired_rows` gives them."""
    return np.zeros(0, np.int64), np.zeros((0, dim), np.float32), np.zeros((0, dim), np.float32)


@torch.no_grad()
def caption_rows(model: DualEncoder, captions: Sequence[str], dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row of width `dim` a caption, as `paired_rows`, with zeros for audio; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = np.array([stable_id(caption_key(caption)) for caption in captions], np.int64)
    batches = [captions[at : at + TEXTS] for at in range(0, len(captions), TEXTS)]
    rows = [model.encode_text(model.text.tokenize(list(batch)).to(device)).cpu() for batch in batches]
    model.train(was_training)
    text = torch.cat([torch.zeros(0, dim), *rows]).numpy()
    return ids, np.zeros_like(text), text


def caption_key(caption: str) -> str:
    """What a caption without audio is called where a clip has its key: equal captions are one."""
    return f"caption:{caption}"


def gather_encoded(part: Encoded) -> Encoded:
    """The parts of all ranks in rank order, on every rank. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return join(parts)


def join(parts: Sequence[Encoded]) -> Encoded:
    """One `Encoded` of several, owners shifted to match."""
    starts = np.cumsum([0] + [len(part.keys) for part in parts])
    whole: dict[str, Any] = {}
    for field in fields(Encoded):
        values = [getattr(part, field.name) for part in parts]
        whole[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else list(chain.from_iterable(values))
    whole["owner"] = torch.cat([part.owner + int(start) for part, start in zip(parts, starts, strict=False)])
    return Encoded(**whole)


def need_clips(encoded: Encoded) -> None:
    """Raises InputError where no clip of a split can be used."""
    if not encoded.keys:
        first = f", the first: {encoded.bad[0]}" if encoded.bad else ""
        raise InputError(f"no clip can be used{first}; pack them again")


def retrieval_results(encoded: Encoded, class_counts: dict[str, int], seed: int) -> dict[str, Any]:
    """Both directions with 95% intervals of R@1, and recall by class frequency, as `report.Results` has them.

    Raises:
        InputError: no clip of the split can be used.
    """
    need_clips(encoded)
    found = ranks(encoded.audio_features, encoded.text_features, encoded.owner)
    owner = encoded.owner.numpy()
    clusters = {"text_to_audio": owner, "audio_to_text": None}
    query_classes = [encoded.classes[clip] for clip in owner]
    return {
        **{direction: queries.metrics() for direction, queries in found.items()},
        "intervals": {
            direction: {"R@1": bootstrap_interval(queries.hits(1), seed, clusters[direction])}
            for direction, queries in found.items()
        },
        "long_tail": long_tail_metrics(found["text_to_audio"].rank, query_classes, class_counts),
    }


def search_index(encoded: Encoded, split: str) -> SearchIndex:
    """An index of a split's own embeddings."""
    clips = [
        IndexedClip(key, tuple(captions), shard, split)
        for key, captions, shard in zip(encoded.keys, encoded.captions, encoded.shards, strict=True)
    ]
    return SearchIndex(encoded.audio_features.numpy(), clips)
