"""In which order training meets the clips: a function of (seed, epoch, sizes, batch geometry), never of timing.

An epoch permutes the shards and strings them together into one virtual sequence. It is cut into `lanes` contiguous
ranges of equal length, and every global batch takes the same number of clips from each lane. Ranks own contiguous
groups of lanes, so a global batch is the same, in the same order, on any number of ranks that divides the lanes.
Within a lane, blocks of `window` clips are permuted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ask_dist.errors import InputError

# NumPy pads a seed with zeros, so that (seed, epoch) and (seed, epoch, 0) would draw the same: the first word tells
# the uses apart.
_SHARDS, _BLOCK, _CLIP = 1, 2, 3


@dataclass(frozen=True)
class Order:
    """The order of one run.

    Attributes:
        counts: clips in each shard.
        seed: 0 or more.
        lanes: into how many ranges an epoch is cut; a multiple of world_size.
        per_lane: clips that a global batch takes from each lane.
        window: clips that are permuted together.
    """

    counts: tuple[int, ...]
    seed: int
    lanes: int
    per_lane: int
    window: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches an epoch; the last ones may be short in some lanes."""
        longest = max(self.lane_length(lane) for lane in range(self.lanes))
        return -(-longest // self.per_lane)

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """Where a lane begins and ends in the virtual sequence."""
        clips = sum(self.counts)
        return lane * clips // self.lanes, (lane + 1) * clips // self.lanes

    def lane_length(self, lane: int) -> int:
        """Clips of a lane in each epoch."""
        first, last = self.lane_bounds(lane)
        return last - first

    def pieces(self, epoch: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The stretch first..last of an epoch's virtual sequence as (shard, first clip in it, how many)."""
        start = 0
        for shard in np.random.default_rng([_SHARDS, self.seed, epoch]).permutation(len(self.counts)):
            stop = start + self.counts[shard]
            skip, end = max(first, start), min(last, stop)
            if skip < end:
                yield int(shard), skip - start, end - skip
            start = stop

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

    def clip_rng(self, epoch: int, clip_id: int) -> np.random.Generator:
        """Draws a clip's caption and crop; the same on whatever rank and step it comes."""
        return np.random.default_rng([_CLIP, self.seed, epoch, clip_id % 2**64])


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
