"""The refiner as a Ray actor that works beside training, on a bounded share of one core."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray

from ask_dist.bank.messages import EXTERNAL, Commit, Snapshot

if TYPE_CHECKING:  # imports torch and torch-geometric, which cost seconds: the first generation pays, not the start
    from ask_dist.refine.refiner import Refiner, RefineReport

log = logging.getLogger(__name__)

MAX_FAILURES = 5  # in a row
FIRST_PAUSE = 0.1  # seconds, doubled by each failure in a row
NICENESS = 10
ANCHORS: tuple[Literal["generation", "first"], ...] = ("generation", "first")


class RefineActor:
    """Generation after generation: snapshot, refine, prototypes, commit; then a rest.

    By the clock it begins at once, so that an actor that Ray restarted goes on by itself. Of a bank in shards each
    generation takes the next one, the first shard last: it holds the prototypes, which are built from a sample of every
    shard. Otherwise it refines when it is told to: what it commits is then a function of the bank and of its state.

    Args:
        banks: names of the bank's actors, one a shard. Not handles: Ray keeps constructor arguments that hold one in
            its object store, and an actor can't be restarted once they are lost there.
        prototypes: granularities that each commit rebuilds.
        interval: least seconds from the start of one generation to that of the next.
        cpu_share: most of one core that it takes, on average over a generation and the rest after it.
        strategy, minimum_fresh: as for `Refiner`. settings: as for `Settings`.
        by_clock: False: only `refine` makes a generation.

    Rows of the run are corrected from generation to generation, external rows from the first frame that it saw them at.
    """

    def __init__(
        self,
        banks: Sequence[str],
        *,
        prototypes: Sequence[int] = (),
        interval: float = 2.0,
        cpu_share: float = 0.1,
        strategy: str = "kernel",
        minimum_fresh: int = 64,
        by_clock: bool = True,
        **settings: int,
    ) -> None:
        os.nice(NICENESS)
        self._levels, self._interval, self._cpu_share = tuple(prototypes), interval, cpu_share
        self._strategy, self._minimum_fresh, self._settings = strategy, minimum_fresh, settings
        self._refiners: dict[tuple[int, str], Refiner] = {}  # by shard and anchor
        self._samples: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # audio and text rows, by shard
        self._lock = threading.RLock()  # the refiners': their state is never read in the middle of a generation
        self._stop = threading.Event()
        self._newest_steps: dict[int, int] = {}
        self._loads = 0
        self._metrics = {"refine/failures": 0.0, "refine/generations": 0.0, "refine/given_up": 0.0}
        self._banks = tuple(banks)
        self._thread = threading.Thread(target=self._loop, name="refine", daemon=True)
        if by_clock:
            self._thread.start()

    def stop(self) -> None:
        """End after the generation in progress, and wait for that."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @ray.method(concurrency_group="told")
    def metrics(self) -> dict[str, float]:
        """`refine/generations` and `refine/failures` so far, `refine/given_up` (1 once too many in a row ended it), and
        the last report's figures as `refine/...`, those of external rows as `refine/external_...`."""
        return dict(self._metrics)

    def begin(self) -> None:
        """Take the bank as it is now as the frame that external rows are carried on from."""
        with self._lock:
            for shard, name in enumerate(self._banks):
                self._refiners.pop((shard, "first"), None)
                self._made(shard, "first").refine(ray.get(ray.get_actor(name).snapshot.remote()))

    def refine(self) -> None:
        """One generation of each shard; commits and all before `load_state` can begin."""
        with self._lock:
            self._newest_steps = {}  # not saved: a run that was resumed would know nothing of it
            for shard in reversed(range(len(self._banks))):
                self._generation(shard, ray.get_actor(self._banks[shard]))

    def state(self) -> dict[str, np.ndarray]:
        """`Refiner.state()` of each anchor, named by it; of several shards each under its number too."""
        with self._lock:
            parts = {self._prefix(*key): refiner.state() for key, refiner in self._refiners.items()}
        return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state()`, after the generation in progress if there is one; an empty state begins anew."""
        with self._lock:
            self._refiners, self._samples, self._newest_steps = {}, {}, {}
            self._loads += 1
            for shard, anchor in itertools.product(range(len(self._banks)), ANCHORS):
                prefix = self._prefix(shard, anchor)
                part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                if part:
                    self._made(shard, anchor).load_state(part)

    def _prefix(self, shard: int, anchor: str) -> str:
        return f"{shard}.{anchor}." if len(self._banks) > 1 else f"{anchor}."

    def _made(self, shard: int, anchor: str) -> Refiner:
        if (shard, anchor) not in self._refiners:
            import torch

            from ask_dist.refine.refiner import Refiner
            from ask_dist.refine.strategies import Settings

            torch.set_num_threads(1)
            settings = Settings(**self._settings)
            self._refiners[shard, anchor] = Refiner(
                self._strategy,
                anchor=anchor,
                minimum_fresh=self._minimum_fresh,
                settings=settings,  # type: ignore[arg-type]
            )
        return self._refiners[shard, anchor]

    def _loop(self) -> None:
        failures, turns = 0, itertools.cycle(reversed(range(len(self._banks))))
        while not self._stop.is_set() and failures < MAX_FAILURES:
            started, cpu = time.monotonic(), time.process_time()
            try:
                shard = next(turns)
                self._generation(shard, ray.get_actor(self._banks[shard]))
                failures = 0
            except Exception as error:  # a bank that restarts, or one bad generation, must not end the refinement
                # A bank that Ray is restarting comes back; that alone never makes the refiner give up.
                failures += not isinstance(error, ray.exceptions.ActorUnavailableError)
                self._metrics["refine/failures"] += 1
                log.warning("generation failed, %d in a row", failures, exc_info=True)
            used = time.process_time() - cpu
            rest = max(self._interval, used / self._cpu_share, FIRST_PAUSE * 2**failures if failures else 0.0)
            self._stop.wait(max(0.0, rest - (time.monotonic() - started)))
        self._metrics["refine/given_up"] = float(failures == MAX_FAILURES)

    def _generation(self, shard: int, bank: Any) -> None:
        loads, snapshot = self._loads, ray.get(bank.snapshot.remote())
        if len(snapshot.ids) == 0 or snapshot.newest_step == self._newest_steps.get(shard):
            return
        with self._lock:
            if loads != self._loads:  # put back meanwhile, and the bank with it: what it showed is of no use any more
                return
            commits, reports = self._refined(shard, snapshot)
        for commit in commits:
            ray.get(bank.commit.remote(commit))
        self._newest_steps[shard] = snapshot.newest_step
        self._metrics["refine/generations"] += 1
        for anchor, report in reports.items():
            if report is not None:
                prefix = "refine/" if anchor == "generation" else "refine/external_"
                self._metrics |= {f"{prefix}{name}": float(value) for name, value in asdict(report).items()}

    def _refined(self, shard: int, snapshot: Snapshot) -> tuple[list[Commit], dict[str, RefineReport | None]]:
        """A generation of one shard, its reports by anchor; the first shard's brings prototypes of all."""
        from ask_dist.refine.refiner import PROTOTYPE_ROWS, refined, sampled_rows, with_prototypes

        parts, seed = self._parts(shard, snapshot), self._settings.get("seed", 0)
        commits, reports = refined(list(parts.values()), snapshot)
        self._samples[shard] = sampled_rows(snapshot, commits, PROTOTYPE_ROWS // len(self._banks), seed)
        if shard == 0:
            audio, text = (np.concatenate(halves) for halves in zip(*self._samples.values(), strict=True))
            commits = with_prototypes(commits, snapshot, (audio, text), self._levels, seed)
        return commits, dict(zip(parts, reports, strict=True))

    def _parts(self, shard: int, snapshot: Snapshot) -> dict[str, tuple[Refiner, np.ndarray]]:
        """Each refiner of a shard and its rows, by anchor."""
        external = snapshot.step == EXTERNAL
        parts = {"generation": (self._made(shard, "generation"), np.flatnonzero(~external))}
        if external.any():
            first = self._made(shard, "first")
            known = first.source_ids
            rows = np.arange(len(external)) if known is None else np.flatnonzero(np.isin(snapshot.ids, known))
            parts["first"] = (first, rows)
        return parts


# Metrics have a lane of their own: they say that the actor is alive, however many calls wait for a long generation.
RemoteRefineActor = ray.remote(max_concurrency=2, concurrency_groups={"told": 1}, max_restarts=-1)(RefineActor)  # type: ignore[call-overload]
