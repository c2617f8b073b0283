"""The client's interface over a bank in the same process, for training loops without Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit, Knowledge
from ask_dist.bank.prototypes import Prototypes, build_prototypes


class LocalBankClient:
    """`BankClient`'s methods over a `KnowledgeBank` of this process: every answer is in time.

    Example:
        >>> client = LocalBankClient(KnowledgeBank(dim=2, capacity=100), neighbours=4)
        >>> rows = np.eye(2, dtype=np.float32)
        >>> client.upsert(np.array([7, 8]), rows, rows, None, step=0)
        >>> client.prefetch(np.array([7]))
        >>> client.collect().ids
        array([8])
    """

    def __init__(self, bank: KnowledgeBank, neighbours: int) -> None:
        self._bank, self._neighbours = bank, neighbours
        self._asked: np.ndarray | None = None

    @property
    def prototypes(self) -> Prototypes | None:
        """The bank's newest prototypes."""
        return self._bank.prototypes

    def prefetch(self, ids: np.ndarray) -> None:
        """Choose whose neighbours (ids int64 [n]) the next `collect()` returns."""
        self._asked = ids

    def collect(self) -> Knowledge | None:
        """The neighbours of the ids last prefetched, once."""
        asked, self._asked = self._asked, None
        return None if asked is None else self._bank.search_ids(asked, self._neighbours)

    def upsert(
        self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray, reliability: np.ndarray | None, step: int
    ) -> None:
        """Write rows encoded at global step `step`, as `KnowledgeBank.upsert`."""
        self._bank.upsert(ids, audio, text, reliability, step)

    def rebuild_prototypes(self, levels: Sequence[int], seed: int = 0) -> None:
        """Cluster the bank as it is now; with Ray the refiner does this once a generation."""
        now = self._bank.snapshot()
        levels_now = build_prototypes(now.audio, now.text, levels, seed)
        self._bank.commit(Commit.of_prototypes(levels_now, now))

    def metrics(self) -> dict[str, float]:
        """As `BankClient.metrics`: nothing is ever late, failed or dropped."""
        return {"bank/late_share": 0.0, "bank/failed": 0.0, "bank/dropped_upserts": 0.0}
