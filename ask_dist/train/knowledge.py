"""A worker's link to the bank and the refiner, in torch's terms."""

from __future__ import annotations

from typing import Any

import ray
import torch
from torch import Tensor

from ask_dist.bank.client import BankClient
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.losses.injection import Neighbours

MINIMUM_ANSWERS = 50


class KnowledgeSource:
    """Neighbours for the next batch, rows for the bank, and what both actors say of themselves.

    Nothing here waits for an actor, unless the run is deterministic.

    Args:
        config: the run.
        bank: handle of the BankActor.
        refiner: handle of the RefineActor, or None.
        device: where the embeddings are.
    """

    def __init__(self, config: Config, bank: Any, refiner: Any, device: torch.device) -> None:
        self._config, self._bank, self._refiner, self._device = config, bank, refiner, device
        self._client = BankClient(
            bank, max_in_flight=config.bank.max_in_flight, deterministic=config.optimization.deterministic
        )
        gates = [config.knowledge.start]
        if config.knowledge.reliability.enabled:
            gates.append(config.knowledge.reliability.start)
        self._start = min(gates)
        self._asked = 0
        self._polls: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}

    def prefetch(self, ids: Tensor, progress: float) -> None:
        """Asks for the neighbours of the next batch, once any gate is open by then."""
        if progress >= self._start:
            self._client.prefetch(ids.cpu().numpy())
            self._asked += 1

    def collect(self) -> Neighbours | None:
        """What the bank answered to `prefetch`; None: a plain step.

        Raises:
            InputError: more answers were late or failed than `bank.max_late_share` allows.
        """
        answer = self._client.collect()
        if answer is None:
            self._check_late_share()
            return None
        return Neighbours.of(answer, self._client.prototypes, self._device)

    def upsert(self, ids: Tensor, audio: Tensor, text: Tensor, reliability: Tensor, global_step: int) -> None:
        """Sends the rows that this step encoded: int64 [n], float [n, dim] twice, float [n]."""
        rows = (tensor.detach().float().cpu().numpy() for tensor in (audio, text, reliability))
        self._client.upsert(ids.cpu().numpy(), *rows, global_step)

    def metrics(self) -> dict[str, float]:
        """The client's counts, and the last metrics that the actors gave; asks them anew without waiting."""
        calls = {"bank": self._bank.metrics}
        if self._refiner is not None:
            calls["refiner"] = self._refiner.metrics
        for name, method in calls.items():
            request = self._polls.get(name)
            if request is not None and ray.wait([request], timeout=0)[0]:
                self._metrics |= _answer(request)
                request = None
            self._polls[name] = method.remote() if request is None else request
        return self._metrics | self._client.metrics()

    def _check_late_share(self) -> None:
        share, limit = self._client.metrics()["bank/late_share"], self._config.bank.max_late_share
        if self._asked >= MINIMUM_ANSWERS and share > limit:
            raise InputError(
                f"{share:.0%} of the bank's answers came late, bank.max_late_share allows {limit:.0%}; "
                "give it cores of its own (cluster.bank_cpus), lower knowledge.neighbours, or raise the limit"
            )


def _answer(request: Any) -> dict[str, float]:
    try:
        return ray.get(request)
    except ray.exceptions.RayError:
        return {}  # an actor that is being restarted says nothing this time
