"""Captions without their audio: those of a split, and wrong ones on purpose."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError

Words = TypeVar("Words", bound=Hashable)
TRIES = 1000


def captions(shards: ShardList, limit: int) -> Iterator[str]:
    """Captions in shard order, at most about `limit`, taken evenly from the shards; unreadable ones are passed over.

    Seeks from header to header: for a local split this reads a few percent of its bytes.
    """
    share = max(1, limit // max(1, len(shards.paths)))
    for path in shards.paths:
        count = 0
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if count >= share:
                        break
                    if not member.name.endswith(".json") or not member.isfile():
                        continue
                    content = tar.extractfile(member)
                    for caption in json.load(content).get("captions", []) if content else []:
                        count += 1
                        yield str(caption)
        except (OSError, tarfile.TarError, ValueError, AttributeError):
            continue  # the loader names what is broken


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
