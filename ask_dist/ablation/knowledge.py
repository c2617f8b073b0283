"""Bank and refiner of one trial, in the trial's own process."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from ask_dist.ablation.space import Trial
from ask_dist.bank.local import LocalBankClient
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.evaluate.drift import mean_drift, neighbour_overlap
from ask_dist.losses.injection import Neighbours
from ask_dist.refine.refiner import Refiner, generation
from ask_dist.refine.strategies import Settings

# first, last -> unit rows (audio, text) of these training scenes, by the present weights without dropout
Encode = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


class TrialKnowledge:
    """What a run's two actors do, called step by step so that a trial can be repeated.

    Args:
        trial: the settings.
        trained: training scenes; their ids are 0 to trained - 1.
        further: scenes of the knowledge corpus, whose ids follow.
        encode: encodes scenes by id.
    """

    def __init__(self, trial: Trial, trained: int, further: int, encode: Encode) -> None:
        self._trial, self._trained, self._rows, self._encode = trial, trained, trained + further, encode
        self._bank = KnowledgeBank(trial.corpus.model.embedding_dim, self._rows)
        self._client = LocalBankClient(self._bank, trial.arm.knowledge.neighbours)
        refine = trial.refine
        settings = Settings(refine.neighbours, refine.hidden, refine.steps, trial.seed)
        strategy = "none" if trial.arm.strategy == "reencode" else trial.arm.strategy
        anchor = "first" if further else "generation"
        self._refiner = Refiner(strategy, anchor=anchor, minimum_fresh=refine.minimum_fresh, settings=settings)
        self._opened = False
        self.refine_seconds: list[float] = []

    def neighbours(self, ids: Tensor) -> Neighbours | None:
        """What the bank knows near these pairs, by their stored rows; None while it is too empty to tell."""
        self._client.prefetch(ids.numpy())
        answer = self._client.collect()
        return Neighbours.of(answer, self._client.prototypes) if answer is not None and len(answer.ids) else None

    def upsert(self, ids: Tensor, audio: Tensor, text: Tensor, reliability: Tensor, step: int) -> None:
        """Rows that a step encoded."""
        if self._trial.arm.bank == "live" or not self._opened:
            rows = (rows.detach().numpy() for rows in (audio, text))
            self._bank.upsert(ids.numpy(), *rows, reliability.numpy(), step)

    def open(self, step: int) -> None:
        """When the gate opens: the knowledge corpus, or the whole of a bank that is encoded once, comes in."""
        if self._rows > self._trained or self._trial.arm.bank == "once":
            self._reencode(0, self._rows, step)
            self._refiner.refine(self._bank.snapshot())  # the frame that later corrections start from
        self._opened = True

    def refine(self, step: int) -> None:
        """One generation: corrected rows and new prototypes."""
        start = time.perf_counter()
        if self._trial.arm.strategy == "reencode":
            self._reencode(self._trained, self._rows, step)
            self.refine_seconds.append(time.perf_counter() - start)
        parts = [(self._refiner, None)]
        (commit,), (report,) = generation(parts, self._bank.snapshot(), self._trial.prototypes, self._trial.seed)
        self._bank.commit(commit)
        if report is not None and self._trial.arm.strategy != "reencode":
            self.refine_seconds.append(report.seconds)

    def measures(self) -> dict[str, float]:
        """Drift and overlap@10 of the rows that training does not re-encode, or else of the trained ones; seconds of a
        refinement, prototypes aside, and of encoding those rows."""
        first, last = (self._trained, self._rows) if self._rows > self._trained else (0, self._trained)
        start = time.perf_counter()
        fresh = dict(zip(("audio", "text"), self._encode(first, last), strict=True))
        encode_seconds = time.perf_counter() - start
        now = self._bank.snapshot()
        chosen = (now.ids >= first) & (now.ids < last)
        order = np.argsort(now.ids[chosen])
        found = {}
        for name, rows in fresh.items():
            stored = getattr(now, name)[chosen][order].astype(np.float32)
            known = rows[now.ids[chosen][order] - first]
            found[f"drift_{name}"] = mean_drift(stored, known)
            found[f"overlap_{name}"] = neighbour_overlap(stored, known)
        refine_seconds = float(np.mean(self.refine_seconds)) if self.refine_seconds else 0.0
        return found | {"refine_seconds": refine_seconds, "encode_seconds": encode_seconds}

    def _reencode(self, first: int, last: int, step: int) -> None:
        audio, text = self._encode(first, last)
        self._bank.upsert(np.arange(first, last), audio, text, None, step)
