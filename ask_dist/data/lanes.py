"""The lanes of a rank, read and decoded: what happens in a decoding process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ask_dist.data.audio import BadSample, fit_length, own_length
from ask_dist.data.leaks import HeldOut
from ask_dist.data.order import Order, Piece
from ask_dist.data.quarantine import Record
from ask_dist.data.samples import Raw, open_clip, open_description, read_clips
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.data.slots import Slots

# Captions -> int64 [captions, tokens], padded with 0 at the end. It is pickled for decoding processes.
Tokenize = Callable[[list[str]], torch.Tensor]

NO_ID = -1
CHANGED = "its SHA-256 is not that of sizes.json; clips that can still be read are used"


@dataclass
class Part:
    """The clips of some lanes at one step; an invalid one has zeros and "". `audio` is float32 [clips, samples], and
    [clips, 0] as long as it lies in a decoding process's slot. `notices` name whole shards; `tokens` are int64
    [clips, tokens], [clips, 0] where nobody needs them; `lengths` are empty where all clips are as long."""

    ids: list[int]
    keys: list[str]
    audio: np.ndarray
    captions: list[str]
    tokens: np.ndarray
    valid: list[bool]
    swapped: list[bool]
    bad: list[Record] = field(default_factory=list)
    notices: list[Record] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Cut:
    """What becomes of clips: `sample_rate` in Hz, `samples` that each gets, `max_seconds` that a file may have, and
    those that are `held_out`. With `undecodable` no sound is decoded, and these keys are bad, for its reasons. What
    makes tokens of captions, if anybody needs them, is `tokenize`. With a `step` each has its `own_length`, and zeros
    behind it."""

    sample_rate: int
    samples: int
    max_seconds: float
    held_out: HeldOut = field(default_factory=HeldOut)
    undecodable: Mapping[str, str] | None = None
    tokenize: Tokenize | None = None
    step: int = 0


class LaneReader(IterableDataset[Part]):
    """Reads and decodes a rank's lanes from a global step on; in a DataLoader process, its share of them, with the
    sounds in `slots`."""

    def __init__(
        self, shards: ShardList, order: Order, lanes: range, cut: Cut, start_step: int = 0, slots: Slots | None = None
    ) -> None:
        self._shards, self._order, self._lanes, self._cut = shards, order, lanes, cut
        self._start_step, self._slots = start_step, slots
        self._notices: list[Record] = []
        self._verified: set[int] = set()

    def starting_at(self, step: int, slots: Slots | None = None) -> LaneReader:
        """The same from another step on, for decoding processes with their slots."""
        return LaneReader(self._shards, self._order, self._lanes, self._cut, step, slots)

    def slots(self, processes: int) -> Slots:
        """Room for what so many decoding processes read of it; raises as `Slots` does."""
        return Slots(processes, -(-len(self._lanes) // processes) * self._order.per_lane, self._cut.samples)

    def without_sounds(self, undecodable: Mapping[str, str]) -> LaneReader:
        """The same clips with their captions alone: audio is [clips, 0], and nothing is decoded."""
        return self._with(replace(self._cut, samples=0, step=0, undecodable=undecodable))

    def without_tokens(self) -> LaneReader:
        """The same clips with tokens [clips, 0]."""
        return self._with(replace(self._cut, tokenize=None))

    def _with(self, cut: Cut) -> LaneReader:
        return LaneReader(self._shards, self._order, self._lanes, cut, self._start_step)

    def __iter__(self) -> Iterator[Part]:
        lanes = self._lanes
        worker = get_worker_info()
        if worker is not None:
            first, last = (len(lanes) * index // worker.num_workers for index in (worker.id, worker.id + 1))
            lanes = lanes[first:last]
        streams = [self._lane(lane) for lane in lanes]
        for number in itertools.count():
            clips = [next(stream) for stream in streams for _ in range(self._order.per_lane)]
            epoch = (self._start_step + number) // self._order.steps_per_epoch
            if worker is None or self._slots is None:
                part = self._decode(clips, epoch, np.empty((len(clips), self._cut.samples), np.float32))
            else:
                part = self._decode(clips, epoch, self._slots.of(worker.id, number, len(clips)))
                part.audio = np.empty((len(clips), 0), np.float32)
            part.notices, self._notices = self._notices, []
            yield part

    def _lane(self, lane: int) -> Iterator[tuple[Raw, int] | None]:
        """A lane's clips and turns through all epochs; None where it is shorter than the epoch's steps ask for."""
        order = self._order
        places = order.steps_per_epoch * order.per_lane
        epoch, step = divmod(self._start_step, order.steps_per_epoch)
        skip = step * order.per_lane
        while True:
            yield from self._epoch(epoch, lane, skip)
            yield from itertools.repeat(None, places - max(skip, order.lane_length(lane)))
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, lane: int, skip: int) -> Iterator[tuple[Raw, int]]:
        order = self._order
        lane_start, lane_stop = order.lane_bounds(lane)
        blocks = [(number, *block) for number, block in enumerate(order.blocks(lane)) if block[1] > skip]
        if not blocks:
            return
        pieces = order.pieces(epoch, lane_start + blocks[0][1], lane_stop)
        clips = itertools.chain.from_iterable(map(self._piece, pieces))
        for number, start, stop in blocks:
            block: list[Any] = list(itertools.islice(clips, stop - start))
            for place in order.block_order(epoch, lane, number, stop - start)[max(0, skip - start) :]:
                yield block[place]
                block[place] = None  # free its bytes

    def _piece(self, piece: Piece) -> Iterator[tuple[Raw, int]]:
        name = self._shards.labels[piece.shard]
        for place, raw in enumerate(read_clips(self._shards, piece.shard, piece.first, piece.clips, name), 1):
            if place == piece.clips:  # by now the file is in memory, and nothing waited for it
                self._verify(piece.shard, name)
            yield raw, piece.turn

    def _verify(self, shard: int, name: str) -> None:
        """Names a shard that is not what was packed; once a process, since later epochs read the same bytes."""
        if shard not in self._verified:
            self._verified.add(shard)
            if self._shards.changed(shard):
                self._notices.append({"shard": name, "key": "", "reason": CHANGED})

    def _decode(self, clips: Sequence[tuple[Raw, int] | None], epoch: int, audio: np.ndarray) -> Part:
        size = len(clips)
        tokens = np.empty((size, 0), np.int64)
        part = Part([NO_ID] * size, [""] * size, audio, [""] * size, tokens, [False] * size, [False] * size)
        part.lengths = [self._cut.step] * size if self._cut.step else []
        for place, clip in enumerate(clips):
            if clip is not None:
                try:
                    self._fill(part, place, *clip, epoch)
                except BadSample as error:
                    part.bad.append({"shard": clip[0].shard, "key": clip[0].key, "reason": str(error)})
            if not part.valid[place]:
                audio[place] = 0
        if self._cut.tokenize is not None:
            part.tokens = self._cut.tokenize(part.captions).numpy()
        return part

    def _fill(self, part: Part, place: int, raw: Raw, turn: int, epoch: int) -> None:
        self._cut.held_out.refuse(raw)
        room = part.audio[place]
        audio, description = self._open(raw, room)
        clip_id, captions = stable_id(raw.key), description["captions"]
        # Making a generator takes 6% of the time of decoding four seconds: only where there is something to draw.
        drawn = len(captions) > 1 or len(audio) > self._cut.samples
        rng = self._order.clip_rng(epoch, clip_id, turn) if drawn else None
        part.captions[place] = captions[rng.integers(len(captions)) if rng else 0]
        if len(audio) != len(room) or not np.may_share_memory(audio, room):  # else it is where it belongs
            room[:] = fit_length(audio, len(room), rng)
        if part.lengths:
            part.lengths[place] = own_length(len(audio), len(room), self._cut.step)
        part.ids[place], part.keys[place] = clip_id, raw.key
        part.swapped[place] = bool(description.get("swapped", False))
        part.valid[place] = True

    def _open(self, raw: Raw, room: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        if self._cut.undecodable is None:
            audio, description = open_clip(raw, self._cut.sample_rate, self._cut.max_seconds, room)
            self._cut.held_out.refuse_likeness(raw, audio, self._cut.sample_rate)
            return audio, description
        description = open_description(raw)
        if raw.key in self._cut.undecodable:
            raise BadSample(self._cut.undecodable[raw.key])
        return np.empty(0, np.float32), description
