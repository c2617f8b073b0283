"""Captions without their audio: those of a split, and wrong ones on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from ask_dist.data.audio import BadSample
from ask_dist.data.samples import LARGEST, describe
from ask_dist.data.shards import ShardList, evenly
from ask_dist.data.tar import members
from ask_dist.errors import InputError

Words = TypeVar("Words", bound=Hashable)
TRIES = 1000
LOCAL_SHARDS, REMOTE_SHARDS = 1000, 16  # most that captions are taken from


def captions(shards: ShardList, limit: int) -> Iterator[str]:
    """Captions in shard order, at most `limit`, taken evenly from the shards; unreadable ones are passed over.

    Seeks from header to header: for a local split this reads a few percent of its bytes. Of very many shards, or of
    those behind URLs, only some are looked into.
    """
    count = min(len(shards.paths), REMOTE_SHARDS if shards.remote else LOCAL_SHARDS)
    share = max(1, limit // count)
    for shard in evenly(len(shards.paths), count):
        with suppress(OSError, BadSample), shards.at_hand(shard) as path:  # the loader names what is broken
            yield from itertools.islice(_captions_of(path), share)


def _captions_of(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for member in members(stream):
            if member.name.endswith(".json") and member.size <= LARGEST["json"]:
                stream.seek(member.offset)
                with suppress(BadSample):
                    yield from describe(stream.read(member.size))["captions"]


def swap_captions(captions: Sequence[Words], share: float, seed: int) -> tuple[list[Words], np.ndarray]:
    """Permutes the captions of a drawn share of the clips among themselves, so that each of these reads otherwise.

    Args:
        captions: one entry a clip: a caption, or a tuple of several.
        share: of the clips, from 0 to 1.
        seed: draws which, and whose caption each gets.

    Returns:
        The captions, and bool [clips]: whose changed.

    Raises:
        InputError: too many of the drawn captions read the same.
    """
    rng = np.random.default_rng([seed, 2])
    chosen = rng.permutation(len(captions))[: round(share * len(captions))]
    given = np.arange(len(chosen))
    for _ in range(TRIES):
        same = [i for i, giver in enumerate(given) if captions[chosen[giver]] == captions[chosen[i]]]
        if not same:
            break
        for i in same:
            other = rng.integers(len(given))
            given[i], given[other] = given[other], given[i]
    else:
        raise InputError(f"swapping the captions of {len(chosen)} clips: too few differ; raise the share or the clips")
    result, swapped = list(captions), np.zeros(len(captions), dtype=bool)
    for place, giver in zip(chosen, given, strict=True):
        result[place], swapped[place] = captions[chosen[giver]], True
    return result, swapped
