"""Steps with something and without it in turns of one run: a machine whose speed drifts slows both alike."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import ray

from ask_dist import config as configuration
from ask_dist.train.loop import log_step, set_up, with_next
from ask_dist.train.state import TrainState
from ask_dist.train.step import train_step

Row = dict[str, float]
Switched = Literal["knowledge", "refiner"]

ON = "bench/on"  # in a row of metrics: 1 of a turn with it, 0 of one without


class KnowledgeSwitch:
    """Without: plain steps. The bank and the refiner stay as they are.

    Each worker has a core of this machine to itself, with all its threads, and the bank the next one.
    """

    def __init__(self, state: TrainState) -> None:
        self._state, self._knowledge = state, state.knowledge
        _keep_to(state.rank, os.getpid())
        if state.rank == 0:
            for bank in state.actors.primaries.values():
                _keep_to(state.world_size, _process(bank))

    def turn(self, on: bool) -> None:
        self._state.knowledge = self._knowledge if on else None


class RefinerSwitch:
    """Without: the refiner's process, on this machine, is stopped. What it did stays in the bank."""

    def __init__(self, state: TrainState) -> None:
        self._process = _process(state.actors.refiner) if state.rank == 0 else None

    def turn(self, on: bool) -> None:
        if self._process is not None:
            os.kill(self._process, signal.SIGCONT if on else signal.SIGSTOP)


def _process(actor: Any) -> int:
    """The number of an actor's process."""
    return ray.get(actor.__ray_call__.remote(lambda actor: os.getpid()))


def _keep_to(core: int, process: int) -> None:
    """Lets a process compute on one core alone; threads that it starts from now on too."""
    for thread in os.listdir(f"/proc/{process}/task"):
        os.sched_setaffinity(int(thread), {core})


SWITCHES = {"knowledge": KnowledgeSwitch, "refiner": RefinerSwitch}


def train_in_turns(switched: Switched, job: dict[str, Any]) -> None:
    """As `train.loop.train_loop_per_worker`, up to the last step alone, `log_every` steps without it and as many with.

    A row of metrics is of a turn but for its first step, which may have no answer yet, or be beside what the turn
    before began.
    """
    state = set_up(configuration.parse(job["config"]), job)
    switch = SWITCHES[switched](state)
    try:
        _train(state, switch)
    finally:
        switch.turn(True)


def _train(state: TrainState, switch: KnowledgeSwitch | RefinerSwitch) -> None:
    length = state.config.optimization.log_every
    since, trained, used = 0.0, np.zeros(2), 0.0
    for batch, following in with_next(state.loader.batches(), state):
        turn, position = divmod(state.engine.global_step, length)
        if position == 0:
            switch.turn(turn % 2 == 1)
        values, *more = train_step(state, batch, following)
        trained += more
        used += values.get("train/knowledge_used", 0.0)
        if position == 0:
            state.clock.take()
            since, trained, used = time.monotonic(), np.zeros(2), 0.0
        elif position == length - 1:
            rates = trained / (time.monotonic() - since)
            values |= {ON: float(turn % 2), "train/knowledge_used": used / (length - 1)}
            log_step(state, values, *rates.tolist())


def in_turns(switched: Switched) -> Any:
    """A loop for `train.run.fit`."""
    return partial(train_in_turns, switched)


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each turn without and the one with it that follows."""
    return [(off, on) for off, on in itertools.pairwise(rows) if on[ON] > off[ON]]


def compared(found: Sequence[tuple[Row, Row]]) -> dict[str, float]:
    """`ratio` of a step's seconds with it to those without, the median over pairs of turns, and the quartiles of that;
    the number of pairs, and the medians of the seconds, `with_seconds` and `without_seconds`."""
    low, ratio, high = np.quantile([on["step_seconds"] / off["step_seconds"] for off, on in found], (0.25, 0.5, 0.75))
    without, beside = (statistics.median(row["step_seconds"] for row in side) for side in zip(*found, strict=True))
    return {
        **{"ratio": float(ratio), "first_quartile": float(low), "third_quartile": float(high)},
        **{"pairs": len(found), "with_seconds": beside, "without_seconds": without},
    }
