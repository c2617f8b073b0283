"""Batches for training, resumable from the global step alone, and batches for evaluation."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ask_dist.data.audio import BadSample, fit_length, in_samples, own_length
from ask_dist.data.lanes import Cut, LaneReader, Part, Tokenize
from ask_dist.data.leaks import HeldOut, recording_of, sound_digest
from ask_dist.data.order import Order, lanes_of
from ask_dist.data.prefetch import prefetched
from ask_dist.data.processes import end_with_parent
from ask_dist.data.quarantine import BadSamples, Record
from ask_dist.data.samples import MAX_SECONDS, Raw, open_clip, read_clips
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.data.slots import AHEAD
from ask_dist.errors import InputError

FEW_BAD = 20  # so many must be bad before an epoch is over, lest one early bad clip stop a run
RESTARTS = 2  # of decoding processes that died at one step
log = logging.getLogger(__name__)


@dataclass
class Batch:
    """One rank's part of a global batch; B is the local batch size.

    Where `valid` is False (the end of an epoch, a bad sample) the id is -1, the key "" and audio, caption,
    tokens and length are a valid sample's, or zeros, "", its tokens and the shortest length where the batch has none.

    Attributes:
        ids: int64 [B].
        keys: B names.
        audio: float32 [B, samples], in pinned memory where there is a GPU.
        captions: one a clip.
        tokens: int64 [B, tokens] of the captions, padded with 0, pinned like audio; [B, 0] where nobody needs them.
        valid: bool [B].
        swapped: bool [B], the "swapped" of the clip's JSON.
        epoch: from 0.
        step: the global step, from 0, counted through the epochs.
        lengths: int64 [B] on the CPU, of each clip its own samples, which zeros follow; None: all are as long.
    """

    ids: torch.Tensor
    keys: list[str]
    audio: torch.Tensor
    captions: list[str]
    tokens: torch.Tensor
    valid: torch.Tensor
    swapped: torch.Tensor
    epoch: int
    step: int
    lengths: torch.Tensor | None = None


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
        sounds: n of `leaks.sound_digest`.
        recordings: n of `leaks.recording_of`.
        lengths: int64 [n], as in `Batch`.
    """

    ids: torch.Tensor
    keys: list[str]
    audio: torch.Tensor
    captions: list[list[str]]
    classes: list[list[str]]
    shards: list[str]
    sounds: list[bytes]
    recordings: list[str]
    lengths: torch.Tensor | None = None


class TrainLoader:
    """One rank's endless stream of training batches; see order.py for what is in which batch.

    Memory: each lane of the rank holds up to `shuffle_window` undecoded clips, half of that on average.

    Args:
        shards: the training split.
        rank: this process, from 0.
        world_size: processes in all; it must divide `lanes`.
        local_batch_size: clips a rank and step; times world_size it must be a multiple of `lanes`.
        seed: draws the order, the captions and the crops.
        sample_rate: in Hz; clips at another rate are resampled.
        clip_seconds: longer clips are cropped at random, shorter ones padded.
        length_step: seconds; shorter clips count as long as the next multiple. With None as all others.
        lanes: see order.py. The order depends on it, so a run keeps it when its world_size changes.
        shuffle_window: clips shuffled together in a lane.
        processes: that decode and tokenize; 0 does it in a thread. The batches are the same.
        max_bad_share: more bad samples than this share of an epoch, or of what was met in more, stop the run; on each
            rank one shard is spared that is no larger share of the corpus.
        max_clip_seconds: longer audio is bad; see audio.decode.
        quarantine: file that gets a line for each bad sample, or None.
        held_out: clips that count as bad samples if they are met.
        tokenize: makes tokens of captions; with None batches come without.

    Raises:
        InputError: the batch, the lanes and the ranks don't fit together, or the weights leave no clip.
    """

    def __init__(
        self,
        shards: ShardList,
        *,
        rank: int,
        world_size: int,
        local_batch_size: int,
        seed: int,
        sample_rate: int,
        clip_seconds: float,
        lanes: int = 8,
        shuffle_window: int = 512,
        processes: int = 0,
        max_bad_share: float = 0.01,
        max_clip_seconds: float = MAX_SECONDS,
        quarantine: Path | None = None,
        held_out: HeldOut | None = None,
        tokenize: Tokenize | None = None,
        length_step: float | None = None,
    ) -> None:
        own = lanes_of(rank, world_size, lanes)
        global_batch = local_batch_size * world_size
        if local_batch_size < 1 or global_batch % lanes:
            raise InputError(
                f"a global batch of {global_batch} ({local_batch_size} x {world_size} ranks) over {lanes} lanes: "
                f"make local_batch_size a multiple of {lanes // world_size}"
            )
        order = Order(shards.counts, seed, lanes, global_batch // lanes, shuffle_window, shards.weights)
        if not order.clips:
            raise InputError("the weights leave no clip of the training shards: raise data.weights")
        self.steps_per_epoch = order.steps_per_epoch
        self.bad = BadSamples(quarantine)
        self._clips_per_epoch = sum(order.lane_length(lane) for lane in own)
        # One shard that can't be read falls to a rank or two, whose share of bad clips is then larger.
        one_shard = min(max(shards.counts), max_bad_share * order.clips)
        self._most_bad = max(max_bad_share, one_shard / max(1, self._clips_per_epoch))
        self._processes = min(processes, len(own))
        self._max_bad_share = max_bad_share
        samples, step = in_samples(sample_rate, clip_seconds, length_step)
        cut = Cut(sample_rate, samples, max_clip_seconds, held_out or HeldOut(), tokenize=tokenize, step=step)
        self._reader = LaneReader(shards, order, own, cut)

    def leave_out_sounds(self, undecodable: Mapping[str, str]) -> None:
        """From now on the same batches come with audio [B, 0] and without lengths, and nothing is decoded.

        Args:
            undecodable: keys of clips whose sound can't be used, with the reason: bad samples as before.
        """
        self._reader = self._reader.without_sounds(undecodable)

    def leave_out_tokens(self) -> None:
        """From now on the same batches come with tokens [B, 0]."""
        self._reader = self._reader.without_tokens()

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from a global step on, exactly those of an uninterrupted stream; it never ends.

        Raises:
            InputError: too many samples are bad.
        """
        with closing(prefetched(self._merged(start_step))) as batches:
            for batch, bad, notices in batches:
                self.bad.note(int(batch.valid.sum()) + len(bad), bad, notices)
                self._check_bad()
                yield batch

    def _merged(self, start_step: int) -> Iterator[tuple[Batch, list[Record], list[Record]]]:
        for step, now in self._steps(start_step):
            bad = [record for part in now for record in part.bad]
            yield merge(now, step // self.steps_per_epoch, step), bad, [n for part in now for n in part.notices]

    def _steps(self, start_step: int) -> Iterator[tuple[int, list[Part]]]:
        """The parts of each step. Decoding processes that die (of want of memory, say) are replaced, at their step."""
        step, deaths = start_step, 0
        parts = self._parts(step)
        while True:
            try:
                now = list(itertools.islice(parts, max(1, self._processes)))
            except (RuntimeError, OSError, EOFError) as error:
                deaths += 1
                if not _of_a_death(error) or deaths > RESTARTS:
                    raise
                log.warning("a decoding process died (%s); new ones go on at step %d", error, step)
                parts = self._parts(step)
                continue
            yield step, now
            step, deaths = step + 1, 0

    def _parts(self, start_step: int) -> Iterator[Part]:
        """For each step one part, or one from each decoding process, in the order of the lanes; a part's audio is
        good until the next step's parts are asked for."""
        if not self._processes:
            yield from self._reader.starting_at(start_step)
            return
        slots = self._reader.slots(self._processes)
        loader = DataLoader(
            self._reader.starting_at(start_step, slots),
            batch_size=None,
            num_workers=self._processes,
            prefetch_factor=AHEAD,
            multiprocessing_context="forkserver",
            worker_init_fn=_begin,
            generator=torch.Generator(),  # else it draws from the one that a step's dropout has just seeded
        )
        for number, part in enumerate(loader):
            turn, process = divmod(number, self._processes)
            part.audio = slots.of(process, turn, len(part.ids))
            yield part

    def _check_bad(self) -> None:
        bad = self.bad
        early = bad.delivered < self._clips_per_epoch and bad.count < FEW_BAD
        if bad.count > self._most_bad * max(bad.delivered, self._clips_per_epoch) and not early:
            last = bad.records[-1]
            raise InputError(
                f"{bad.count} of {bad.delivered} samples are bad, over max_bad_share {self._max_bad_share}; the last: "
                f"{last['shard']} {last['key']} ({last['reason']}); pack the shards again or raise max_bad_share"
            )


def _begin(_worker: int) -> None:
    """Prepares a decoding process: it ends with its trainer, and tokenizers of Hugging Face use one thread in it, as
    torch does; the user's own setting counts."""
    end_with_parent()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def merge(parts: Sequence[Part], epoch: int, step: int) -> Batch:
    """Join the parts of a step and fill the invalid places with the first valid sample."""
    valid = [flag for part in parts for flag in part.valid]
    captions = [caption for part in parts for caption in part.captions]
    lengths = [length for part in parts for length in part.lengths]
    audio = _joined([part.audio for part in parts])
    width = max(part.tokens.shape[1] for part in parts)
    tokens = _joined([np.pad(part.tokens, ((0, 0), (0, width - part.tokens.shape[1]))) for part in parts])
    if any(valid):
        donor = valid.index(True)
        for place, flag in enumerate(valid):
            if not flag:
                audio[place] = audio[donor]
                captions[place] = captions[donor]
                tokens[place] = tokens[donor]
                if lengths:
                    lengths[place] = lengths[donor]
    return Batch(
        ids=torch.tensor([clip_id for part in parts for clip_id in part.ids], dtype=torch.int64),
        keys=[key for part in parts for key in part.keys],
        audio=audio,
        captions=captions,
        tokens=tokens,
        valid=torch.tensor(valid),
        swapped=torch.tensor([flag for part in parts for flag in part.swapped]),
        epoch=epoch,
        step=step,
        lengths=torch.tensor(lengths) if lengths else None,
    )


def _joined(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """In one piece, in pinned memory where there is a GPU, and not in anybody else's."""
    if torch.cuda.is_available():
        parts = [torch.from_numpy(part) for part in rows]
        shape = (sum(map(len, rows)), *rows[0].shape[1:])
        return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=True))
    return torch.from_numpy(rows[0] if len(rows) == 1 and rows[0].flags.owndata else np.concatenate(rows))


def _of_a_death(error: Exception) -> bool:
    """Whether a DataLoader's error says that a process is gone, not what went wrong in one ("Caught ...")."""
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError) and not str(error).startswith("Caught")
    return lost or str(error).startswith("DataLoader worker")


class EvalLoader:
    """One rank's contiguous part of a split, in the order of the shards, cropped in the middle.

    Args:
        shards: the split.
        rank: this process, from 0.
        world_size: processes in all; any number.
        batch_size: clips a batch; the last one may be smaller.
        sample_rate: in Hz; clips at another rate are resampled.
        clip_seconds: longer clips are cut, shorter ones padded.
        length_step: as in `TrainLoader`.
        limit: only the first so many clips of the split, or None for all.
        max_clip_seconds: longer audio is bad; see audio.decode.
        held_out: clips that count as bad samples if they are met.
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
        max_clip_seconds: float = MAX_SECONDS,
        held_out: HeldOut | None = None,
        length_step: float | None = None,
    ) -> None:
        self.bad = BadSamples()
        self._shards, self._batch_size, self._sample_rate = shards, batch_size, sample_rate
        self._samples, self._step = in_samples(sample_rate, clip_seconds, length_step)
        self._max_seconds = max_clip_seconds
        self._held_out = held_out or HeldOut()
        clips = shards.clips if limit is None else min(limit, shards.clips)
        self._first, self._last = rank * clips // world_size, (rank + 1) * clips // world_size

    def batches(self) -> Generator[EvalBatch, None, None]:
        """All batches once; bad samples are left out and counted in `bad`, anew in each pass."""
        self.bad = BadSamples()
        yield from prefetched(self._batches())

    def _batches(self) -> Iterator[EvalBatch]:
        clips = self._clips()
        while chunk := list(itertools.islice(clips, self._batch_size)):
            raws, waveforms, lengths, descriptions = zip(*chunk, strict=True)
            keys = [raw.key for raw in raws]
            yield EvalBatch(
                ids=torch.tensor([stable_id(key) for key in keys], dtype=torch.int64),
                keys=keys,
                audio=torch.stack(waveforms),
                captions=[description["captions"] for description in descriptions],
                classes=[description.get("classes", []) for description in descriptions],
                shards=[raw.shard for raw in raws],
                sounds=[sound_digest(raw.sound) for raw in raws],
                recordings=list(map(recording_of, descriptions)),
                lengths=torch.tensor(lengths) if self._step else None,
            )

    def _clips(self) -> Iterator[tuple[Raw, torch.Tensor, int, dict[str, Any]]]:
        for raw in self._raws():
            try:
                self._held_out.refuse(raw)
                audio, description = open_clip(raw, self._sample_rate, self._max_seconds)
                self._held_out.refuse_likeness(raw, audio, self._sample_rate)
            except BadSample as error:
                self.bad.note(1, [{"shard": raw.shard, "key": raw.key, "reason": str(error)}])
                continue
            self.bad.note(1, [])
            length = own_length(len(audio), self._samples, self._step)
            yield raw, torch.from_numpy(fit_length(audio, self._samples, None)), length, description

    def _raws(self) -> Iterator[Raw]:
        start = 0
        for shard, count in enumerate(self._shards.counts):
            first, last = max(self._first, start), min(self._last, start + count)
            if first < last:
                yield from read_clips(self._shards, shard, first - start, last - first)
            start += count
