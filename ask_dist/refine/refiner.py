"""The refiner as a plain class: snapshots in, commits out, without Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ask_dist.bank.messages import EXTERNAL, Commit, Snapshot
from ask_dist.bank.prototypes import build_prototypes
from ask_dist.errors import InputError
from ask_dist.evaluate.drift import mean_drift, neighbour_overlap
from ask_dist.refine.gnn import Gnn
from ask_dist.refine.strategies import Kernel, KnnMean, Linear, Mlp, Move, NoChange, Settings, Task

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
PART = 4096  # rows brought forward at a time, in float32; the others wait in float16
PROTOTYPE_ROWS = 32_768  # drawn for the prototypes, where there are more; FAISS takes no more for 128 of them


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
    """One modality as corrections start from it: ids and step int64 [n], values float16 [n, d]; and the newest step
    when it was taken. A row that the bank got later joins as it was when first seen."""

    ids: np.ndarray
    step: np.ndarray
    values: np.ndarray
    newest_step: int


@dataclass(frozen=True)
class _Correction:
    """A modality's fresh and stale rows (positions in the snapshot), how to bring a stale one to `frame`, the values
    float16 [stale, d] that this gives, and how well it went; without values where it was not applied."""

    fresh: np.ndarray
    stale: np.ndarray
    values: np.ndarray | None
    frame: int
    measures: dict[str, float]

    @property
    def applied(self) -> bool:
        return self.values is not None


class Refiner:
    """Corrects the rows that nobody has re-encoded lately, by what the re-encoded ones tell.

    Each modality has a source: the rows at a known earlier frame. Rows re-encoded since are pairs (source value, fresh
    value); the strategy learns their drift and applies it to the source values of the rows that were not re-encoded.
    Its memory is that of the source and of the corrected rows, both float16, and of `PART` rows at work.

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

    @property
    def source_ids(self) -> np.ndarray | None:
        """The ids int64 [n] that it has a source of; None before its first snapshot."""
        return self._sources["audio"].ids if self._sources else None

    def refine(self, snapshot: Snapshot, rows: np.ndarray | None = None) -> tuple[Commit | None, RefineReport | None]:
        """The correction of one snapshot and its report.

        Args:
            snapshot: the bank as it is now.
            rows: positions int64 [n] of the rows that are looked at; None: all.

        Returns:
            (None, None) on the first snapshot and while too few rows are fresh. (None, report) if no modality got
            better by its correction: then nothing is committed, and the source stays where it is.
        """
        started = time.perf_counter()
        rows = np.arange(len(snapshot.ids)) if rows is None else rows
        for name in MODALITIES:
            old = self._sources.get(name)
            self._sources[name] = _joined(old, snapshot, name, rows) if old else _source_of(snapshot, name, rows)
        corrections = {name: self._correct(name, snapshot, rows) for name in MODALITIES}
        audio, text = corrections["audio"], corrections["text"]
        if audio is None or text is None:
            return None, None
        for name, correction in (("audio", audio), ("text", text)):
            if correction.applied:
                self._advance(name, snapshot, rows, correction)
        report = RefineReport(
            generation=snapshot.generation + 1,
            fresh=len(audio.fresh),
            stale=max(len(audio.stale), len(text.stale)),
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

    def _correct(self, name: str, snapshot: Snapshot, rows: np.ndarray) -> _Correction | None:
        source = self._sources[name]
        at = _positions(source.ids, snapshot.ids[rows])
        then, now = source.step[at], snapshot.step[rows]
        since = np.maximum(then, source.newest_step) if self._anchor == "first" else then
        fresh = np.flatnonzero(now > since)
        if len(fresh) < self._minimum_fresh:
            return None
        fresh = fresh[np.argsort(-now[fresh], kind="stable")][:MAX_FRESH]
        frame = int(now[fresh].mean())
        stale = np.flatnonzero((now <= then) & (snapshot.frame[rows] < frame))
        stale = stale[_present(snapshot, name, rows[stale])]
        order = np.random.default_rng([self._settings.seed, snapshot.generation]).permutation(fresh)
        held_out, fit = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]

        def values(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """These rows at the source frame and now."""
            pair = source.values[at[chosen]], getattr(snapshot, name)[rows[chosen]]
            return pair[0].astype(np.float32), pair[1].astype(np.float32)

        move = self._strategies[name].fit(Task(*values(fit)))
        before, truth = values(held_out)
        after = move(before)
        measures = {
            f"drift_before_{name}": mean_drift(before, truth),
            f"drift_after_{name}": mean_drift(after, truth),
            f"overlap_before_{name}": neighbour_overlap(before, truth, OVERLAP_NEIGHBOURS),
            f"overlap_after_{name}": neighbour_overlap(after, truth, OVERLAP_NEIGHBOURS),
        }
        applied = measures[f"drift_after_{name}"] < measures[f"drift_before_{name}"]
        moved = _moved(move, source.values, at[stale]) if applied else None
        return _Correction(rows[fresh], rows[stale], moved, frame, measures)

    def _advance(self, name: str, snapshot: Snapshot, rows: np.ndarray, correction: _Correction) -> None:
        """Let the corrected bank be the next generation's source, or with a fixed source only note the time."""
        if self._anchor == "first":
            self._sources[name] = replace(self._sources[name], newest_step=snapshot.newest_step)
        else:
            self._sources[name] = source = _source_of(snapshot, name, rows)
            source.values[_positions(rows, correction.stale)] = correction.values


def generation(
    parts: Sequence[tuple[Refiner, np.ndarray | None]], snapshot: Snapshot, levels: Sequence[int], seed: int
) -> tuple[list[Commit], list[RefineReport | None]]:
    """Corrected rows and new prototypes of one snapshot.

    Args:
        parts: refiners, which go on from their last generation, and the rows that each looks at, as for `refine`.
        snapshot: the bank as it is now.
        levels: granularities of the prototypes.
        seed: of their k-means, and of the rows that they are made of.

    Returns:
        Commits, each whole by itself, the last of them with the prototypes; and the report of each part.
    """
    commits, reports = refined(parts, snapshot)
    rows = sampled_rows(snapshot, commits, PROTOTYPE_ROWS, seed)
    return with_prototypes(commits, snapshot, rows, levels, seed), reports


def refined(
    parts: Sequence[tuple[Refiner, np.ndarray | None]], snapshot: Snapshot
) -> tuple[list[Commit], list[RefineReport | None]]:
    """As `generation`, without prototypes."""
    done = [refiner.refine(snapshot, rows) for refiner, rows in parts]
    return [commit for commit, _ in done if commit is not None], [report for _, report in done]


def sampled_rows(snapshot: Snapshot, commits: Sequence[Commit], most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio and text, float32 [n, d], of at most `most` rows with both halves, as these commits leave them."""
    drawn = np.arange(len(snapshot.ids))
    if len(drawn) > most:
        drawn = np.sort(np.random.default_rng(seed).choice(drawn, most, replace=False))
    audio, text = corrected_rows(snapshot, commits, drawn)
    whole = audio.any(axis=1) & text.any(axis=1)
    return audio[whole], text[whole]


def with_prototypes(
    commits: Sequence[Commit],
    snapshot: Snapshot,
    rows: tuple[np.ndarray, np.ndarray],
    levels: Sequence[int],
    seed: int,
) -> list[Commit]:
    """The commits, or one that corrects nothing, the last with prototypes of these audio and text rows [n, d]."""
    prototypes = build_prototypes(*rows, levels, seed)
    if not commits:
        return [Commit.of_prototypes(prototypes, snapshot)]
    return [*commits[:-1], replace(commits[-1], prototypes=prototypes)]


def corrected_rows(snapshot: Snapshot, commits: Sequence[Commit], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Audio and text, float32 [n, d], of these rows (positions in the snapshot) as its commits leave them."""
    ids = snapshot.ids[rows]
    audio, text = snapshot.audio[rows].astype(np.float32), snapshot.text[rows].astype(np.float32)
    for commit in commits:
        mine = np.isin(ids, commit.ids)
        at = _positions(commit.ids, ids[mine])
        audio[mine], text[mine] = commit.audio[at], commit.text[at]
    return audio, text


def _commit(snapshot: Snapshot, audio: _Correction, text: _Correction) -> Commit | None:
    applied = [correction for correction in (audio, text) if correction.applied]
    if not applied:
        return None
    rows = np.unique(np.concatenate([correction.stale for correction in applied]))
    values = [
        _values(stored, correction, rows) for stored, correction in ((snapshot.audio, audio), (snapshot.text, text))
    ]
    frame = min(correction.frame for correction in applied)
    return Commit(snapshot.ids[rows], values[0], values[1], snapshot.version[rows], frame, life=snapshot.life)


def _values(stored: np.ndarray, correction: _Correction, rows: np.ndarray) -> np.ndarray:
    """A modality's values, float16 [n, d], of these rows (ascending positions in the snapshot) as corrected."""
    if correction.values is not None and len(correction.stale) == len(rows):
        return correction.values
    values = stored[rows].astype(np.float16, copy=False)
    if correction.values is not None:
        values[_positions(rows, correction.stale)] = correction.values
    return values


def _moved(move: Move, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The rows of float16 [n, d] at these positions, brought forward part by part: float16 [positions, d]."""
    moved = np.empty((len(at), values.shape[1]), np.float16)
    for start in range(0, len(at), PART):
        moved[start : start + PART] = move(values[at[start : start + PART]].astype(np.float32))
    return moved


def _present(snapshot: Snapshot, name: str, rows: np.ndarray) -> np.ndarray:
    """bool [n]: which of these rows have this half. Only external ones may lack one, which is then stored as zeros."""
    present = np.ones(len(rows), bool)
    external = np.flatnonzero(snapshot.step[rows] == EXTERNAL)
    present[external] = getattr(snapshot, name)[rows[external]].any(axis=1)
    return present


def _source_of(snapshot: Snapshot, name: str, rows: np.ndarray) -> _Source:
    values = getattr(snapshot, name)[rows].astype(np.float16, copy=False)
    return _Source(snapshot.ids[rows], snapshot.step[rows], values, snapshot.newest_step)


def _joined(source: _Source, snapshot: Snapshot, name: str, rows: np.ndarray) -> _Source:
    """The source with the rows that the snapshot saw first, each as it was then."""
    new = rows[~np.isin(snapshot.ids[rows], source.ids)]
    if not len(new):
        return source
    more = _source_of(snapshot, name, new)
    whole = {
        field: np.concatenate([getattr(source, field), getattr(more, field)]) for field in ("ids", "step", "values")
    }
    return _Source(**whole, newest_step=source.newest_step)


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted id stands in `ids`, int64 [n]; every one must be there."""
    order = np.argsort(ids)
    return order[np.searchsorted(ids, wanted, sorter=order)]


def _under(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
