"""Batches for training, resumable from the global step alone, and batches for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ask_dist.data.audio import BadSample, fit_length
from ask_dist.data.order import Order, lanes_of
from ask_dist.data.prefetch import prefetched
from ask_dist.data.samples import Raw, open_clip, read_shard
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.errors import InputError

FEW_BAD = 20  # so many must be bad before an epoch is over, lest one early bad clip stop a run
NO_ID = -1


@dataclass
class Batch:
    """One rank's part of a global batch; B is micro_batch_size.

    Where `valid` is False (the end of an epoch, a bad sample) the id is -1, the key "" and audio and caption are a
    valid sample's, or zeros and "" where the batch has none.

    Attributes:
        ids: int64 [B].
        keys: B names.
        audio: float32 [B, samples], in pinned memory where there is a GPU.
        captions: one a clip.
        valid: bool [B].
        swapped: bool [B], the "swapped" of the clip's JSON.
        epoch: from 0.
        step: the global step, from 0, counted through the epochs.
    """

    ids: torch.Tensor
    keys: list[str]
    audio: torch.Tensor
    captions: list[str]
    valid: torch.Tensor
    swapped: torch.Tensor
    epoch: int
    step: int


@dataclass
class EvalBatch:
    """Clips with all their captions.

    Attributes:
        ids: int64 [n], n up to the batch size.
        keys: n names.
        audio: float32 [n, samples].
        captions: n lists of one or more.
        classes: n lists, which may be empty.
        shards: n names of tar files.
    """

    ids: torch.Tensor
    keys: list[str]
    audio: torch.Tensor
    captions: list[list[str]]
    classes: list[list[str]]
    shards: list[str]


@dataclass
class BadSamples:
    """The bad samples that a loader met.

    Attributes:
        delivered: samples delivered so far, bad ones included.
        count: how many of them were bad.
        records: {"shard", "key", "reason"}, each once.
    """

    delivered: int = 0
    count: int = 0
    records: list[dict[str, str]] = field(default_factory=list)

    def note(self, delivered: int, bad: list[dict[str, str]]) -> None:
        """Count a batch."""
        self.delivered += delivered
        self.count += len(bad)
        for record in bad:
            if record not in self.records:
                self.records.append(record)


class TrainLoader:
    """One rank's endless stream of training batches; see order.py for what is in which batch.

    Memory: each lane of the rank holds up to `shuffle_window` undecoded clips, half of that on average.

    Args:
        shards: the training split.
        rank: this process, from 0.
        world_size: processes in all; it must divide `lanes`.
        micro_batch_size: clips a rank and step; times world_size it must be a multiple of `lanes`.
        seed: draws the order, the captions and the crops.
        sample_rate: in Hz; clips at another rate are resampled.
        clip_seconds: longer clips are cropped at random, shorter ones padded.
        lanes: see order.py. The order depends on it, so a run keeps it when its world_size changes.
        shuffle_window: clips shuffled together in a lane.
        processes: that decode; 0 decodes in a thread. The batches are the same.
        max_bad_share: more bad samples than this share stop the run.

    Raises:
        InputError: the batch, the lanes and the ranks don't fit together.
    """

    def __init__(
        self,
        shards: ShardList,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        seed: int,
        sample_rate: int,
        clip_seconds: float,
        lanes: int = 8,
        shuffle_window: int = 512,
        processes: int = 0,
        max_bad_share: float = 0.01,
    ) -> None:
        own = lanes_of(rank, world_size, lanes)
        global_batch = micro_batch_size * world_size
        if micro_batch_size < 1 or global_batch % lanes:
            raise InputError(
                f"a global batch of {global_batch} ({micro_batch_size} x {world_size} ranks) over {lanes} lanes: "
                f"make micro_batch_size a multiple of {lanes // world_size}"
            )
        order = Order(shards.counts, seed, lanes, global_batch // lanes, shuffle_window)
        self.steps_per_epoch = order.steps_per_epoch
        self.bad = BadSamples()
        self._clips_per_epoch = sum(order.lane_length(lane) for lane in own)
        self._processes = min(processes, len(own))
        self._max_bad_share = max_bad_share
        self._reader = _LaneReader(shards, order, own, sample_rate, round(clip_seconds * sample_rate))

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from a global step on, exactly those of an uninterrupted stream; it never ends.

        Raises:
            InputError: too many samples are bad.
        """
        with closing(prefetched(self._merged(start_step))) as batches:
            for batch, bad in batches:
                self.bad.note(int(batch.valid.sum()) + len(bad), bad)
                self._check_bad()
                yield batch

    def _merged(self, start_step: int) -> Iterator[tuple[Batch, list[dict[str, str]]]]:
        parts = self._parts(start_step)
        for step in itertools.count(start_step):
            now = list(itertools.islice(parts, max(1, self._processes)))
            yield merge(now, step // self.steps_per_epoch, step), [record for part in now for record in part.bad]

    def _parts(self, start_step: int) -> Iterator[Part]:
        """For each step one part, or one from each decoding process, in the order of the lanes."""
        reader = self._reader.starting_at(start_step)
        if not self._processes:
            return iter(reader)
        return iter(
            DataLoader(reader, batch_size=None, num_workers=self._processes, multiprocessing_context="forkserver")
        )

    def _check_bad(self) -> None:
        bad = self.bad
        early = bad.delivered < self._clips_per_epoch and bad.count < FEW_BAD
        if bad.count > self._max_bad_share * bad.delivered and not early:
            last = bad.records[-1]
            raise InputError(
                f"{bad.count} of {bad.delivered} samples are bad, over max_bad_share {self._max_bad_share}; the last: "
                f"{last['shard']} {last['key']} ({last['reason']}); pack the shards again or raise max_bad_share"
            )


@dataclass
class Part:
    """The clips of some lanes at one step; an invalid one has zeros and ""."""

    ids: list[int]
    keys: list[str]
    audio: torch.Tensor
    captions: list[str]
    valid: list[bool]
    swapped: list[bool]
    bad: list[dict[str, str]]


def merge(parts: Sequence[Part], epoch: int, step: int) -> Batch:
    """Join the parts of a step and fill the invalid places with the first valid sample."""
    valid = [flag for part in parts for flag in part.valid]
    captions = [caption for part in parts for caption in part.captions]
    audio = torch.cat([part.audio for part in parts]) if len(parts) > 1 else parts[0].audio
    if any(valid):
        donor = valid.index(True)
        for place, flag in enumerate(valid):
            if not flag:
                audio[place] = audio[donor]
                captions[place] = captions[donor]
    return Batch(
        ids=torch.tensor([clip_id for part in parts for clip_id in part.ids], dtype=torch.int64),
        keys=[key for part in parts for key in part.keys],
        audio=audio.pin_memory() if torch.cuda.is_available() else audio,
        captions=captions,
        valid=torch.tensor(valid),
        swapped=torch.tensor([flag for part in parts for flag in part.swapped]),
        epoch=epoch,
        step=step,
    )


class _LaneReader(IterableDataset[Part]):
    """Reads and decodes a rank's lanes; in a DataLoader process, that process's share of them."""

    def __init__(
        self, shards: ShardList, order: Order, lanes: range, sample_rate: int, samples: int, start_step: int = 0
    ) -> None:
        self._shards, self._order, self._lanes = shards, order, lanes
        self._sample_rate, self._samples, self._start_step = sample_rate, samples, start_step

    def starting_at(self, step: int) -> _LaneReader:
        return _LaneReader(self._shards, self._order, self._lanes, self._sample_rate, self._samples, step)

    def __iter__(self) -> Iterator[Part]:
        lanes = self._lanes
        worker = get_worker_info()
        if worker is not None:
            first, last = (len(lanes) * index // worker.num_workers for index in (worker.id, worker.id + 1))
            lanes = lanes[first:last]
        streams = [self._lane(lane) for lane in lanes]
        for step in itertools.count(self._start_step):
            raws = [next(stream) for stream in streams for _ in range(self._order.per_lane)]
            yield self._decode(raws, step // self._order.steps_per_epoch)

    def _lane(self, lane: int) -> Iterator[Raw | None]:
        """A lane's clips through all epochs; None where it is shorter than the epoch's steps ask for."""
        order = self._order
        places = order.steps_per_epoch * order.per_lane
        epoch, step = divmod(self._start_step, order.steps_per_epoch)
        skip = step * order.per_lane
        while True:
            yield from self._epoch(epoch, lane, skip)
            yield from itertools.repeat(None, places - max(skip, order.lane_length(lane)))
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, lane: int, skip: int) -> Iterator[Raw]:
        order = self._order
        lane_start, lane_stop = order.lane_bounds(lane)
        blocks = [(number, *block) for number, block in enumerate(order.blocks(lane)) if block[1] > skip]
        if not blocks:
            return
        pieces = order.pieces(epoch, lane_start + blocks[0][1], lane_stop)
        raws = itertools.chain.from_iterable(
            read_shard(self._shards.paths[shard], first, count) for shard, first, count in pieces
        )
        for number, start, stop in blocks:
            block: list[Any] = list(itertools.islice(raws, stop - start))
            for place in order.block_order(epoch, lane, number, stop - start)[max(0, skip - start) :]:
                yield block[place]
                block[place] = None  # free its bytes

    def _decode(self, raws: Sequence[Raw | None], epoch: int) -> Part:
        size = len(raws)
        # Not zeros: fresh zeroed pages for each batch cost more than filling recycled memory.
        audio = torch.empty(size, self._samples)
        part = Part([NO_ID] * size, [""] * size, audio, [""] * size, [False] * size, [False] * size, [])
        waveforms = audio.numpy()
        for place, raw in enumerate(raws):
            if raw is not None:
                try:
                    self._fill(part, waveforms, place, raw, epoch)
                except BadSample as error:
                    part.bad.append({"shard": raw.shard, "key": raw.key, "reason": str(error)})
            if not part.valid[place]:
                waveforms[place] = 0
        return part

    def _fill(self, part: Part, waveforms: np.ndarray, place: int, raw: Raw, epoch: int) -> None:
        audio, description = open_clip(raw, self._sample_rate)
        clip_id, captions = stable_id(raw.key), description["captions"]
        # Making a generator takes 6% of the time of decoding four seconds: only where there is something to draw.
        drawn = len(captions) > 1 or len(audio) > self._samples
        rng = self._order.clip_rng(epoch, clip_id) if drawn else None
        part.captions[place] = captions[rng.integers(len(captions)) if rng else 0]
        waveforms[place] = fit_length(audio, self._samples, rng)
        part.ids[place], part.keys[place] = clip_id, raw.key
        part.swapped[place] = bool(description.get("swapped", False))
        part.valid[place] = True


class EvalLoader:
    """One rank's contiguous part of a split, in the order of the shards, cropped in the middle.

    Args:
        shards: the split.
        rank: this process, from 0.
        world_size: processes in all; any number.
        batch_size: clips a batch; the last one may be smaller.
        sample_rate: in Hz; clips at another rate are resampled.
        clip_seconds: longer clips are cut, shorter ones padded.
        limit: only the first so many clips of the split, or None for all.
    """

    def __init__(
        self,
        shards: ShardList,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        sample_rate: int,
        clip_seconds: float,
        limit: int | None = None,
    ) -> None:
        self.bad = BadSamples()
        self._shards, self._batch_size, self._sample_rate = shards, batch_size, sample_rate
        self._samples = round(clip_seconds * sample_rate)
        clips = shards.clips if limit is None else min(limit, shards.clips)
        self._first, self._last = rank * clips // world_size, (rank + 1) * clips // world_size

    def batches(self) -> Generator[EvalBatch, None, None]:
        """All batches once; bad samples are left out and counted in `bad`, anew in each pass.

        Raises:
            InputError: all samples of this rank are bad.
        """
        self.bad = BadSamples()
        yield from prefetched(self._batches())
        if self.bad.count and self.bad.count == self.bad.delivered:
            raise InputError(f"all {self.bad.count} samples are bad, the first: {self.bad.records[0]}; pack them again")

    def _batches(self) -> Iterator[EvalBatch]:
        clips = self._clips()
        while chunk := list(itertools.islice(clips, self._batch_size)):
            raws, waveforms, descriptions = zip(*chunk, strict=True)
            keys = [raw.key for raw in raws]
            yield EvalBatch(
                ids=torch.tensor([stable_id(key) for key in keys], dtype=torch.int64),
                keys=keys,
                audio=torch.stack(waveforms),
                captions=[description["captions"] for description in descriptions],
                classes=[description.get("classes", []) for description in descriptions],
                shards=[raw.shard for raw in raws],
            )

    def _clips(self) -> Iterator[tuple[Raw, torch.Tensor, dict[str, Any]]]:
        start = 0
        for path, count in zip(self._shards.paths, self._shards.counts, strict=True):
            first, last = max(self._first, start), min(self._last, start + count)
            for raw in read_shard(path, first - start, last - first) if first < last else ():
                try:
                    audio, description = open_clip(raw, self._sample_rate)
                except BadSample as error:
                    self.bad.note(1, [{"shard": raw.shard, "key": raw.key, "reason": str(error)}])
                    continue
                self.bad.note(1, [])
                yield raw, torch.from_numpy(fit_length(audio, self._samples, None)), description
            start += count
