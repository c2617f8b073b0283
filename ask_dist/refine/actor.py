"""The refiner as a Ray actor that works beside training, on a bounded share of one core."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

if TYPE_CHECKING:  # imports torch and torch-geometric, which cost seconds: the first generation pays, not the start
    from ask_dist.refine.refiner import Refiner

log = logging.getLogger(__name__)

MAX_FAILURES = 5  # in a row
FIRST_PAUSE = 0.1  # seconds, doubled by each failure in a row
NICENESS = 10


class RefineActor:
    """Generation after generation: snapshot, refine, prototypes, commit; then a rest.

    It begins at once, so that an actor that Ray restarted goes on by itself.

    Args:
        bank: name of the bank's actor. Not a handle: Ray keeps constructor arguments that hold one in its object store,
            and an actor can't be restarted once they are lost there.
        prototypes: granularities that each commit rebuilds.
        interval: least seconds from the start of one generation to that of the next.
        cpu_share: most of one core that it takes, on average over a generation and the rest after it.
        strategy, anchor, minimum_fresh: as for `Refiner`. settings: as for `Settings`.
    """

    def __init__(
        self,
        bank: str,
        *,
        prototypes: Sequence[int] = (),
        interval: float = 2.0,
        cpu_share: float = 0.1,
        strategy: str = "kernel",
        anchor: str = "generation",
        minimum_fresh: int = 64,
        **settings: int,
    ) -> None:
        os.nice(NICENESS)
        self._levels, self._interval, self._cpu_share = tuple(prototypes), interval, cpu_share
        self._refiner_arguments = {"strategy": strategy, "anchor": anchor, "minimum_fresh": minimum_fresh}
        self._settings = settings
        self._refiner: Refiner | None = None
        self._lock = threading.Lock()  # the refiner's: its state is never read in the middle of a generation
        self._stop = threading.Event()
        self._newest_step = -1
        self._reports: list[dict[str, Any]] = []
        self._metrics = {"refine/failures": 0.0, "refine/generations": 0.0}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._loop, args=(bank,), name="refine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the generation in progress, and wait for that."""
        self._stop.set()
        self._thread.join()

    def reports(self) -> list[dict[str, Any]]:
        """A `RefineReport` as a dict for each generation since this was last asked.

        Raises:
            RuntimeError: it gave up after too many failures in a row; the last one is the cause.
        """
        if self._error is not None:
            raise RuntimeError(f"the refiner gave up after {MAX_FAILURES} failures in a row") from self._error
        count = len(self._reports)
        taken, self._reports = self._reports[:count], self._reports[count:]
        return taken

    def metrics(self) -> dict[str, float]:
        """`refine/generations` and `refine/failures` so far, and the last report's figures as `refine/...`."""
        return dict(self._metrics)

    def state(self) -> dict[str, np.ndarray]:
        """`Refiner.state()`; empty before the first generation."""
        with self._lock:
            return {} if self._refiner is None else self._refiner.state()

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state()`, after the generation in progress if there is one; an empty state begins anew."""
        with self._lock:
            self._refiner, self._newest_step = None, -1
            if state:
                self._made().load_state(state)

    def _made(self) -> Refiner:
        if self._refiner is None:
            import torch

            from ask_dist.refine.refiner import Refiner
            from ask_dist.refine.strategies import Settings

            torch.set_num_threads(1)
            self._refiner = Refiner(**self._refiner_arguments, settings=Settings(**self._settings))  # type: ignore[arg-type]
        return self._refiner

    def _loop(self, name: str) -> None:
        failures = 0
        while not self._stop.is_set() and failures < MAX_FAILURES:
            started, cpu = time.monotonic(), time.process_time()
            try:
                self._generation(ray.get_actor(name))
                failures = 0
            except Exception as error:  # a bank that restarts, or one bad generation, must not end the refinement
                # A bank that Ray is restarting comes back; that alone never makes the refiner give up.
                failures += not isinstance(error, ray.exceptions.ActorUnavailableError)
                self._error = error if failures == MAX_FAILURES else None
                self._metrics["refine/failures"] += 1
                log.warning("generation failed, %d in a row", failures, exc_info=True)
            used = time.process_time() - cpu
            rest = max(self._interval, used / self._cpu_share, FIRST_PAUSE * 2**failures if failures else 0.0)
            self._stop.wait(max(0.0, rest - (time.monotonic() - started)))

    def _generation(self, bank: Any) -> None:
        snapshot = ray.get(bank.snapshot.remote())
        if len(snapshot.ids) == 0 or snapshot.newest_step == self._newest_step:
            return
        from ask_dist.refine.refiner import generation

        with self._lock:
            commit, report = generation(self._made(), snapshot, self._levels, self._settings.get("seed", 0))
        ray.get(bank.commit.remote(commit))
        self._newest_step = snapshot.newest_step
        self._metrics["refine/generations"] += 1
        if report is not None:
            self._reports.append(asdict(report))
            self._metrics |= {f"refine/{name}": float(value) for name, value in asdict(report).items()}


RemoteRefineActor = ray.remote(max_concurrency=2, max_restarts=-1)(RefineActor)  # type: ignore[call-overload]
