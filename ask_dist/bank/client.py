"""The worker's side of the bank actor: everything asynchronous, nothing waited for."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
import ray

from ask_dist.bank.messages import Knowledge
from ask_dist.bank.prototypes import Prototypes
from ask_dist.bank.service import BankService, Search

TRANSFER_SECONDS = 1.0  # an answer that is ready on another node travels in milliseconds, unless that node is gone

log = logging.getLogger(__name__)


class BankClient:
    """Prefetches neighbours by id while a step runs and sends new rows without waiting for the bank.

    In a step: `collect()` what was asked for one step before, compute, `upsert(...)`, `prefetch(next ids)`. An answer
    that is not there when it is collected is late: the step goes without, and the late answer is thrown away.

    Args:
        bank: a handle of `RemoteBankActor`, or a service of several.
        max_in_flight: requests, and as many upserts, outstanding at most, a shard; beyond it a prefetch is skipped (its
            step counts as late) and an upsert is dropped (counted).
        deterministic: wait for every answer, so that a run can be repeated exactly.
    """

    def __init__(self, bank: Any, *, max_in_flight: int = 4, deterministic: bool = False) -> None:
        self._bank = bank if isinstance(bank, BankService) else BankService([[bank]])
        self._max_in_flight, self._deterministic = max_in_flight, deterministic
        self._asked: Search | None = None  # whose answer the next collect() wants
        self._searches: list[Search] = []
        self._upserts: list[Any] = []
        self._prototype_request: Any = None
        self._prototype_generation = 0  # generation last asked about: a commit need not bring new prototypes
        self._prototypes: Prototypes | None = None
        self._counts: Counter[str] = Counter()

    @property
    def prototypes(self) -> Prototypes | None:
        """The newest prototypes that have arrived."""
        return self._prototypes

    def prefetch(self, ids: np.ndarray) -> None:
        """Ask for the neighbours of the stored rows of these ids (int64 [n]); `collect()` hands them over."""
        self._counts["asked"] += 1
        self._asked = None
        self._searches = [search for search in self._searches if not search.arrived()]
        if len(self._searches) >= self._max_in_flight:
            self._counts["missed"] += 1
            return
        self._asked = self._bank.search_ids(np.asarray(ids, np.int64))
        self._searches.append(self._asked)

    def collect(self) -> Knowledge | None:
        """The answer to the last `prefetch`, once; None if it is late, failed, or nothing was asked for.

        Its arrays are read-only views of Ray's shared memory.
        """
        asked, self._asked = self._asked, None
        if asked is None:
            return None
        knowledge = None
        if asked.arrived(wait=self._deterministic):
            self._searches.remove(asked)
            answers = self._answer(asked.answers)
            knowledge = None if answers is None else asked.join(answers)
        if knowledge is None:
            self._counts["missed"] += 1
            self._bank.turn_from(asked)
        else:
            self._follow_prototypes(knowledge.generation)
        return knowledge

    def upsert(
        self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray, reliability: np.ndarray | None, step: int
    ) -> None:
        """Send rows, as float16, encoded at global step `step`: ids int64 [n], audio and text [n, d]."""
        if self._upserts:
            done, self._upserts = ray.wait(self._upserts, num_returns=len(self._upserts), timeout=0)
            for request in done:
                self._answer(request)
        if len(self._upserts) >= self._max_in_flight * len(self._bank.shards):
            self._counts["dropped_upserts"] += 1
            return
        rows = (np.asarray(values, np.float16) for values in (audio, text))
        self._upserts += self._bank.upsert(np.asarray(ids, np.int64), *rows, reliability, step)
        if self._deterministic:
            ray.wait(self._upserts, num_returns=len(self._upserts))

    def metrics(self) -> dict[str, float]:
        """Since the start: `bank/late_share`, the share of prefetches that brought nothing (late or failed), and the
        counts `bank/failed` (calls of any kind that the bank refused or did not survive), `bank/dropped_upserts`."""
        return {
            "bank/late_share": self._counts["missed"] / max(1, self._counts["asked"]),
            "bank/failed": float(self._counts["failed"]),
            "bank/dropped_upserts": float(self._counts["dropped_upserts"]),
        }

    def _follow_prototypes(self, generation: int) -> None:
        if self._prototype_request is None and generation != self._prototype_generation:
            self._prototype_generation = generation
            self._prototype_request = self._bank.prototypes()
        request = self._prototype_request
        if request is not None and (self._deterministic or ray.wait([request], timeout=0, fetch_local=False)[0]):
            self._prototypes = self._answer(request) or self._prototypes
            self._prototype_request = None

    def _answer(self, request: Any) -> Any:
        try:
            return ray.get(request, timeout=None if self._deterministic else TRANSFER_SECONDS)
        except ray.exceptions.RayError as error:
            self._counts["failed"] += 1
            if self._counts["failed"] == 1:
                log.warning("the bank failed to answer; steps go on without it: %s", error)
            return None
