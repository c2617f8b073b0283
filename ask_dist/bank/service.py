"""The actors of one bank, for those who call it and need not know how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from ask_dist.bank.messages import Knowledge
from ask_dist.bank.shard import joined, shard_of


@dataclass(frozen=True, eq=False)
class Search:
    """A search on its way: what each shard is asked first, the answers that are waited for, and what joins them."""

    first: Sequence[Any]
    answers: Sequence[Any]
    join: Callable[[list[Any]], Knowledge]

    def arrived(self, *, wait: bool = False) -> bool:
        """Whether all answers, or errors, are there."""
        # Not fetch_local: on another node the answer would only begin to travel now, and every one would be late.
        timeout = None if wait else 0
        return not ray.wait(self.answers, num_returns=len(self.answers), timeout=timeout, fetch_local=False)[1]


class BankService:
    """Shards of a bank, each a primary that takes the writes and read replicas that follow it.

    Args:
        shards: handles of `RemoteBankActor`, of each shard the primary and then its replicas.
        reader: number of who searches: readers are spread over a shard's actors by it.
    """

    def __init__(self, shards: Sequence[Sequence[Any]], reader: int = 0) -> None:
        self.shards = shards
        self._turn = [reader] * len(shards)

    def search_ids(self, ids: np.ndarray) -> Search:
        """Asks for the neighbours of the stored rows of ids (int64 [n]); Ray hands the shards' answers from one to the
        next, and nobody waits."""
        actors = [shard[turn % len(shard)] for shard, turn in zip(self.shards, self._turn, strict=True)]
        if len(actors) == 1:
            answer = [actors[0].search_ids.remote(ids)]
            return Search(answer, answer, lambda answers: answers[0])
        asked, order = np.unique(ids, return_inverse=True)
        own = self.own_rows(asked, actors)
        found = [actor.nearest.remote(asked, *own) for actor in actors]
        chosen = [actor.chosen.remote(shard, *found) for shard, actor in enumerate(actors)]
        count = len(actors)
        return Search(own, [*own, *chosen], lambda answers: joined(asked[order], answers[:count], answers[count:]))

    def own_rows(self, ids: np.ndarray, actors: Sequence[Any] | None = None) -> list[Any]:
        """References to the `OwnRows` of each shard, of its primary unless other actors are named."""
        home = shard_of(ids, len(self.shards))
        actors = actors or [primary for primary, *_ in self.shards]
        return [actor.own_rows.remote(ids[home == shard]) for shard, actor in enumerate(actors)]

    def upsert(
        self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray, reliability: np.ndarray | None, step: int
    ) -> list[Any]:
        """Sends each shard its rows, as `KnowledgeBank.upsert`, and gives references to what they say."""
        if len(self.shards) == 1:
            return [self.shards[0][0].upsert.remote(ids, audio, text, reliability, step)]
        home, calls = shard_of(ids, len(self.shards)), []
        for shard, (primary, *_) in enumerate(self.shards):
            here = home == shard
            if here.any():
                trust = None if reliability is None else reliability[here]
                calls.append(primary.upsert.remote(ids[here], audio[here], text[here], trust, step))
        return calls

    def prototypes(self) -> Any:
        """A reference to the bank's prototypes, which its first shard holds."""
        return self.shards[0][0].prototypes.remote()

    def turn_from(self, search: Search) -> None:
        """Asks another actor from now on, of each shard that did not answer this search at all."""
        for shard, request in enumerate(search.first):
            self._turn[shard] += not _answered(request)


def _answered(request: Any) -> bool:
    if not ray.wait([request], timeout=0, fetch_local=False)[0]:
        return False
    try:
        ray.get(request, timeout=0)
    except ray.exceptions.RayError:
        return False
    return True
