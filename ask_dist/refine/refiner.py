"""The refiner as a plain class: snapshots in, commits out, without Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ask_dist.bank.messages import Commit, Snapshot
from ask_dist.bank.prototypes import build_prototypes
from ask_dist.errors import InputError
from ask_dist.evaluate.drift import mean_drift, neighbour_overlap
from ask_dist.refine.gnn import Gnn
from ask_dist.refine.strategies import Kernel, KnnMean, Linear, Mlp, NoChange, Settings, Task

STRATEGIES: dict[str, type[NoChange]] = {
    "none": NoChange,
    "linear": Linear,
    "knn_mean": KnnMean,
    "kernel": Kernel,
    "mlp": Mlp,
    "gnn": Gnn,
}
MODALITIES = ("audio", "text")
MAX_FRESH = 8192  # pairs a generation learns from; more cost time in proportion and teach little
HELD_OUT = 5  # one in so many fresh rows measures the correction and is never fitted on
OVERLAP_NEIGHBOURS = 10


@dataclass(frozen=True)
class RefineReport:
    """One generation. Drift is the mean 1 - cos to the fresh value and overlap that of the ten nearest, both on
    re-encoded rows that the strategy never saw. A modality that was not applied got no better by its correction."""

    generation: int
    fresh: int
    stale: int
    drift_before_audio: float
    drift_after_audio: float
    overlap_before_audio: float
    overlap_after_audio: float
    applied_audio: bool
    drift_before_text: float
    drift_after_text: float
    overlap_before_text: float
    overlap_after_text: float
    applied_text: bool
    seconds: float


@dataclass(frozen=True)
class _Source:
    """One modality as corrections start from it: ids and step int64 [n], values [n, d]; and the newest step when it was
    taken. A row that the bank got later joins as it was when first seen."""

    ids: np.ndarray
    step: np.ndarray
    values: np.ndarray
    newest_step: int


@dataclass(frozen=True)
class _Correction:
    """A modality's stale rows (positions in the snapshot) brought forward to `frame`, and how well that went."""

    fresh: np.ndarray
    stale: np.ndarray
    values: np.ndarray
    frame: int
    measures: dict[str, float]
    applied: bool


class Refiner:
    """Corrects the rows that nobody has re-encoded lately, by what the re-encoded ones tell.

    Each modality has a source: the rows at a known earlier frame. Rows re-encoded since are pairs (source value, fresh
    value); the strategy learns their drift and applies it to the source values of the rows that were not re-encoded.

    Args:
        strategy: a name of `STRATEGIES`.
        anchor: "generation": after a correction the source is the bank as it then was, so each generation bridges the
            time since the last. "first": the source stays what the first snapshot showed, and every generation
            corrects from there, only the rows that were never re-encoded: for a knowledge corpus outside training.
        minimum_fresh: re-encoded rows that a generation needs; with fewer they are left to gather.
        settings: of the strategy.
    """

    def __init__(
        self,
        strategy: str = "kernel",
        *,
        anchor: Literal["generation", "first"] = "generation",
        minimum_fresh: int = 64,
        settings: Settings | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise InputError(f"refine.strategy {strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}")
        self._anchor, self._minimum_fresh = anchor, minimum_fresh
        self._settings = settings or Settings()
        self._strategies = {name: STRATEGIES[strategy](self._settings) for name in MODALITIES}
        self._sources: dict[str, _Source] = {}

    def refine(self, snapshot: Snapshot) -> tuple[Commit | None, RefineReport | None]:
        """The correction of one snapshot and its report.

        Returns:
            (None, None) on the first snapshot and while too few rows are fresh. (None, report) if no modality got
            better by its correction: then nothing is committed, and the source stays where it is.
        """
        started = time.perf_counter()
        for name in MODALITIES:
            values = getattr(snapshot, name)
            old = self._sources.get(name)
            self._sources[name] = _joined(old, snapshot, values) if old else _source_of(snapshot, values)
        corrections = {name: self._correct(name, snapshot) for name in MODALITIES}
        audio, text = corrections["audio"], corrections["text"]
        if audio is None or text is None:
            return None, None
        for name, correction in (("audio", audio), ("text", text)):
            if correction.applied:
                self._advance(name, snapshot, correction)
        report = RefineReport(
            generation=snapshot.generation + 1,
            fresh=len(audio.fresh),
            stale=len(audio.stale),
            **audio.measures,  # type: ignore[arg-type]
            **text.measures,  # type: ignore[arg-type]
            applied_audio=audio.applied,
            applied_text=text.applied,
            seconds=time.perf_counter() - started,
        )
        return _commit(snapshot, audio, text), report

    def state(self) -> dict[str, np.ndarray]:
        """Sources and network weights, as flat named arrays."""
        state: dict[str, np.ndarray] = {}
        for name, source in self._sources.items():
            state |= {f"source.{name}.{field}": np.asarray(value) for field, value in vars(source).items()}
        for name, strategy in self._strategies.items():
            state |= {f"strategy.{name}.{key}": value.copy() for key, value in strategy.state().items()}
        return state

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state()` of a refiner with the same strategy and settings."""
        self._sources = {}
        for name in MODALITIES:
            source = _under(state, f"source.{name}.")
            if source:
                newest_step = int(source.pop("newest_step"))
                self._sources[name] = _Source(**source, newest_step=newest_step)
            self._strategies[name].load_state(_under(state, f"strategy.{name}."))

    def _correct(self, name: str, snapshot: Snapshot) -> _Correction | None:
        source = self._sources[name]
        at = _positions(source.ids, snapshot.ids)
        step = source.step[at]
        since = np.maximum(step, source.newest_step) if self._anchor == "first" else step
        fresh = np.flatnonzero(snapshot.step > since)
        if len(fresh) < self._minimum_fresh:
            return None
        fresh = fresh[np.argsort(-snapshot.step[fresh], kind="stable")][:MAX_FRESH]
        frame = int(snapshot.step[fresh].mean())
        stale = np.flatnonzero((snapshot.step <= step) & (snapshot.frame < frame))
        order = np.random.default_rng([self._settings.seed, snapshot.generation]).permutation(fresh)
        held_out, fit = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
        then, now = source.values, getattr(snapshot, name)
        before, truth = then[at[held_out]].astype(np.float32), now[held_out].astype(np.float32)
        wanted = np.concatenate([before, then[at[stale]].astype(np.float32)])
        task = Task(then[at[fit]].astype(np.float32), now[fit].astype(np.float32), wanted)
        moved = self._strategies[name].fit_apply(task)
        after, corrected = moved[: len(held_out)], moved[len(held_out) :]
        measures = {
            f"drift_before_{name}": mean_drift(before, truth),
            f"drift_after_{name}": mean_drift(after, truth),
            f"overlap_before_{name}": neighbour_overlap(before, truth, OVERLAP_NEIGHBOURS),
            f"overlap_after_{name}": neighbour_overlap(after, truth, OVERLAP_NEIGHBOURS),
        }
        applied = measures[f"drift_after_{name}"] < measures[f"drift_before_{name}"]
        return _Correction(fresh, stale, corrected, frame, measures, applied)

    def _advance(self, name: str, snapshot: Snapshot, correction: _Correction) -> None:
        """Let the corrected bank be the next generation's source, or with a fixed source only note the time."""
        if self._anchor == "first":
            old = self._sources[name]
            self._sources[name] = _Source(old.ids, old.step, old.values, snapshot.newest_step)
        else:
            values = getattr(snapshot, name).copy()
            values[correction.stale] = correction.values
            self._sources[name] = _source_of(snapshot, values)


def generation(
    refiner: Refiner, snapshot: Snapshot, levels: Sequence[int], seed: int
) -> tuple[Commit, RefineReport | None]:
    """Corrected rows and new prototypes of one snapshot, as one commit.

    Args:
        refiner: goes on from its last generation.
        snapshot: the bank as it is now.
        levels: granularities of the prototypes.
        seed: of their k-means.
    """
    commit, report = refiner.refine(snapshot)
    return with_prototypes(commit, snapshot, corrected_rows(snapshot, commit), levels, seed), report


def with_prototypes(
    commit: Commit | None, snapshot: Snapshot, rows: tuple[np.ndarray, np.ndarray], levels: Sequence[int], seed: int
) -> Commit:
    """The commit, or one that corrects nothing, with prototypes of these audio and text rows [n, d]."""
    prototypes = build_prototypes(*rows, levels, seed)
    return replace(commit, prototypes=prototypes) if commit else Commit.of_prototypes(prototypes, snapshot)


def corrected_rows(snapshot: Snapshot, commit: Commit | None) -> tuple[np.ndarray, np.ndarray]:
    """The bank's audio and text [n, d] as a commit made from this snapshot leaves them."""
    audio, text = snapshot.audio.astype(np.float32), snapshot.text.astype(np.float32)
    if commit is not None:
        at = _positions(snapshot.ids, commit.ids)
        audio[at], text[at] = commit.audio, commit.text
    return audio, text


def _commit(snapshot: Snapshot, audio: _Correction, text: _Correction) -> Commit | None:
    applied = [correction for correction in (audio, text) if correction.applied]
    if not applied:
        return None
    rows = np.unique(np.concatenate([correction.stale for correction in applied]))
    values = []
    for stored, correction in ((snapshot.audio, audio), (snapshot.text, text)):
        whole = stored.astype(np.float32)
        if correction.applied:
            whole[correction.stale] = correction.values
        values.append(whole[rows])
    frame = min(correction.frame for correction in applied)
    return Commit(snapshot.ids[rows], values[0], values[1], snapshot.version[rows], frame)


def _source_of(snapshot: Snapshot, values: np.ndarray) -> _Source:
    return _Source(snapshot.ids, snapshot.step, values, snapshot.newest_step)


def _joined(source: _Source, snapshot: Snapshot, values: np.ndarray) -> _Source:
    """The source with the rows that the snapshot saw first, each as it was then."""
    new = ~np.isin(snapshot.ids, source.ids)
    return _Source(
        np.concatenate([source.ids, snapshot.ids[new]]),
        np.concatenate([source.step, snapshot.step[new]]),
        np.concatenate([source.values, values[new]]),
        source.newest_step,
    )


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted id stands in `ids`, int64 [n]; every one must be there."""
    order = np.argsort(ids)
    return order[np.searchsorted(ids, wanted, sorter=order)]


def _under(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
