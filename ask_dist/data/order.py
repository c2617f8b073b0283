"""In which order training meets the clips: a function of (seed, epoch, sizes, batch geometry), never of timing.

An epoch permutes the shards and strings them together into one virtual sequence. It is cut into `lanes` contiguous
ranges of equal length, and every global batch takes the same number of clips from each lane. Ranks own contiguous
groups of lanes, so a global batch is the same, in the same order, on any number of ranks that divides the lanes.
Within a lane, blocks of `window` clips are permuted.

A shard of weight 2.25 is in the sequence three times: twice whole, and once with a quarter of its clips. Which quarter
is drawn anew each epoch, every clip as likely as another; how many clips that is does not change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ask_dist.errors import InputError

# NumPy pads a seed with zeros, so that (seed, epoch) and (seed, epoch, 0) would draw the same: the first word tells
# the uses apart.
_SHARDS, _BLOCK, _CLIP, _PART, _REPEATED = 1, 2, 3, 4, 5


class Piece(NamedTuple):
    """`clips` clips of a shard from the `first` on, met for the turn-th time in an epoch, from 0."""

    shard: int
    first: int
    clips: int
    turn: int


@dataclass(frozen=True)
class Order:
    """The order of one run.

    Attributes:
        counts: clips in each shard.
        seed: 0 or more.
        lanes: into how many ranges an epoch is cut; a multiple of world_size.
        per_lane: clips that a global batch takes from each lane.
        window: clips that are permuted together.
        weights: how often an epoch meets each clip of each shard; empty: once.
    """

    counts: tuple[int, ...]
    seed: int
    lanes: int
    per_lane: int
    window: int
    weights: tuple[float, ...] = ()

    @cached_property
    def _entries(self) -> np.ndarray:
        """int64 [3, entries]: shard, turn, and clips taken, of what an epoch strings together."""
        counts = np.array(self.counts, dtype=np.int64)
        shards = np.arange(len(counts))
        weights = np.array(self.weights) if self.weights else np.ones(len(counts))
        whole = np.floor(weights).astype(np.int64)
        # Rounded along the running sum, so that the parts of many small shards add up to what the weights ask for.
        parts = np.diff(np.round(np.cumsum((weights - whole) * counts)), prepend=0).astype(np.int64)
        turns = [np.stack([shards, np.full_like(shards, turn), counts])[:, whole > turn] for turn in range(whole.max())]
        return np.concatenate([*turns, np.stack([shards, whole, parts])[:, parts > 0]], axis=1)

    @cached_property
    def clips(self) -> int:
        """Clips that an epoch meets, each as often as it does."""
        return int(self._entries[2].sum())

    @property
    def steps_per_epoch(self) -> int:
        """Global batches an epoch; the last ones may be short in some lanes."""
        longest = max(self.lane_length(lane) for lane in range(self.lanes))
        return -(-longest // self.per_lane)

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """Where a lane begins and ends in the virtual sequence."""
        return lane * self.clips // self.lanes, (lane + 1) * self.clips // self.lanes

    def lane_length(self, lane: int) -> int:
        """Clips of a lane in each epoch."""
        first, last = self.lane_bounds(lane)
        return last - first

    def pieces(self, epoch: int, first: int, last: int) -> Iterator[Piece]:
        """The stretch first..last of an epoch's virtual sequence."""
        shards, turns, sizes = self._entries
        order = np.random.default_rng([_SHARDS, self.seed, epoch]).permutation(len(shards))
        stops = np.cumsum(sizes[order])
        for place in range(int(np.searchsorted(stops, first, side="right")), len(order)):
            entry, stop = order[place], int(stops[place])
            start = stop - int(sizes[entry])
            if start >= last:
                return
            shard, turn = int(shards[entry]), int(turns[entry])
            offset, count = self._offset(epoch, shard, stop - start), self.counts[shard]
            begin, end = offset + max(first, start) - start, offset + min(last, stop) - start
            # What runs over the shard's end goes on at its start.
            for begins, ends in ((begin, min(end, count)), (max(begin - count, 0), end - count)):
                if begins < ends:
                    yield Piece(shard, begins, ends - begins, turn)

    def _offset(self, epoch: int, shard: int, size: int) -> int:
        """Where an epoch's part of a shard begins: at 0 if it is the whole shard."""
        if size == self.counts[shard]:
            return 0
        return int(np.random.default_rng([_PART, self.seed, epoch, shard]).integers(self.counts[shard]))

    def blocks(self, lane: int) -> list[tuple[int, int]]:
        """The blocks of a lane, relative to its start.

        The first one's size differs from lane to lane, or else all lanes would read their next block at one step.
        """
        length = self.lane_length(lane)
        first = max(1, (lane + 1) * self.window // self.lanes)
        edges = [0, *range(first, length, self.window), length]
        return [(start, stop) for start, stop in itertools.pairwise(edges) if start < stop]

    def block_order(self, epoch: int, lane: int, block: int, size: int) -> np.ndarray:
        """int64 [size]: how the clips of a block are permuted."""
        return np.random.default_rng([_BLOCK, self.seed, epoch, lane, block]).permutation(size)

    def clip_rng(self, epoch: int, clip_id: int, turn: int = 0) -> np.random.Generator:
        """Draws a clip's caption and crop; the same on whatever rank and step it comes, another at each turn."""
        uses = [_CLIP, self.seed, epoch, clip_id % 2**64]
        return np.random.default_rng(uses if turn == 0 else [_REPEATED, *uses[1:], turn])


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """The contiguous lanes of a rank.

    Raises:
        InputError: the lanes can't be shared out equally.
    """
    if lanes < 1 or lanes % world_size:
        raise InputError(f"{lanes} lanes for {world_size} ranks: set lanes to a multiple of {world_size}")
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of {world_size}: ranks run from 0 to {world_size - 1}")
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)
