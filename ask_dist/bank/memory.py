"""The knowledge bank itself: a plain class over numpy arrays, without Ray and without torch."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from typing import Literal, Self

import numpy as np
from numpy.typing import DTypeLike

from ask_dist.bank.index import ExactIndex, first_allowed
from ask_dist.bank.inverted import InvertedIndex
from ask_dist.bank.messages import EXTERNAL, Commit, CommitResult, Knowledge, Modality, Snapshot, State
from ask_dist.bank.prototypes import Prototypes, unit_rows
from ask_dist.bank.rows import BLOCK_ROWS, any_value, grown
from ask_dist.errors import InputError

# Rows fetched beyond k in the first pass of a search by id. A query always meets itself and now and then another row
# of its own batch; the few queries that meet more are searched again with enough.
SPARE_NEIGHBOURS = 8
COUNTERS = ("upserts", "rejected", "searches")
PER_ROW = {"ids": np.int64, "step": np.int64, "frame": np.int64, "version": np.int64, "reliability": np.float32}


class KnowledgeBank:
    """Paired embeddings by id, searched by either half, written by workers (`upsert`) and by the refiner (`commit`).

    A row of zeros for audio is a text alone: it is found by text, and never by audio.

    One lock covers every method, so a search sees the bank before or after a write, never half of one.

    Args:
        dim: the embeddings' width.
        capacity: the most rows it may hold; storage grows by chunks as rows come.
        dtype: that values are stored in. "float16" halves memory, state and snapshots; an exact search then converts
            the rows to float32 as it goes through them.
        threads: CPU threads of one search.
        minimum_reliability: neighbours below it are left out of an answer.
        max_age: neighbours whose age in global steps exceeds it are left out of an answer.
        index: "flat" searches exactly; "ivf_flat" by inverted files, "ivf_pq" by inverted files of short codes, whose
            candidates are scored again by the rows themselves; see `maintain`.
        probes: least lists that a search of an inverted file looks into.
        inverted_from: with fewer rows the search is exact all the same.
        recall: share of the nearest rows that a search of inverted files is to find.
        gpu: let a GPU search, where FAISS sees one.
    """

    def __init__(
        self,
        dim: int,
        capacity: int,
        dtype: Literal["float16", "float32"] = "float16",
        *,
        threads: int = 1,
        minimum_reliability: float = 0.0,
        max_age: int | None = None,
        index: Literal["flat", "ivf_flat", "ivf_pq"] = "flat",
        probes: int = 4,
        inverted_from: int = 50_000,
        recall: float = 0.95,
        gpu: bool = False,
    ) -> None:
        self._dim, self._capacity, self._dtype = dim, capacity, np.dtype(dtype)
        self._minimum_reliability, self._max_age = minimum_reliability, max_age
        self._index: dict[str, ExactIndex | InvertedIndex] = {
            name: ExactIndex(dim, dtype, threads, gpu)
            if index == "flat"
            else InvertedIndex(dim, dtype, threads, gpu, kind=index, probes=probes)
            for name in ("audio", "text")
        }
        self._inverted_from, self._wanted_recall = inverted_from, recall
        self._recall = dict.fromkeys(self._index, 1.0)
        self._maintenance = threading.Lock()
        self._meta = {name: np.zeros(0, kind) for name, kind in PER_ROW.items()}
        self._heard = np.zeros(0, bool)  # follows from the rows: those with an audio half
        self._row_of: dict[int, int] = {}
        self._generation, self._newest_step, self._life = 0, 0, uuid.uuid4().hex
        self._prototypes: Prototypes | None = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def prototypes(self) -> Prototypes | None:
        """The prototypes of the last commit that brought some."""
        return self._prototypes

    def upsert(
        self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray, reliability: np.ndarray | None, step: int
    ) -> int:
        """Write rows that were encoded at global step `step`; within one call the last of equal ids wins.

        Rows with a non-finite value, and rows older than what is stored, are dropped and counted as rejected.

        Args:
            ids: int64 [n]. audio, text: [n, dim], any float dtype. reliability: [n], -1 where it is
                not known, or None for 1.

        Returns:
            Rows written.

        Raises:
            InputError: wrong shapes, or more rows than the capacity; then nothing is written.
        """
        reliability = np.ones(len(ids), np.float32) if reliability is None else np.asarray(reliability, np.float32)
        self._check_shapes(ids, audio, text)
        with np.errstate(over="ignore"):  # too large for float16 becomes infinite, and is rejected as such
            audio, text = audio.astype(self._dtype), text.astype(self._dtype)
        finite = np.isfinite(audio).all(1) & np.isfinite(text).all(1) & np.isfinite(reliability)
        last = np.zeros(len(ids), bool)
        last[list({int(ids[i]): i for i in np.flatnonzero(finite)}.values())] = True
        with self._lock:
            rows = self._rows(ids)
            known = rows >= 0
            current = ~known
            current[known] = self._meta["step"][rows[known]] <= step
            keep = last & current
            rows = self._with_new_rows(ids, rows, keep)
            self._write(rows, audio[keep], text[keep], step)
            self._meta["step"][rows] = step
            told = reliability[keep] >= 0  # a step that could not tell leaves what was known before
            self._meta["reliability"][rows[told]] = reliability[keep][told]
            if len(rows):
                self._newest_step = max(self._newest_step, step)
            self._counts["upserts"] += len(rows)
            self._counts["rejected"] += int((~finite | ~current).sum())
        return len(rows)

    def search_ids(self, ids: np.ndarray, k: int) -> Knowledge:
        """The union of the k nearest rows by audio and by text to each *stored* row of these ids, and these rows.

        The asked ids themselves are never among the neighbours; an unknown id is not used as a query. The filters given
        at construction leave out neighbours afterwards: one that is not trusted is not replaced by a farther one.
        """
        with self._lock:
            self._counts["searches"] += 1
            rows = self._rows(ids)
            queried = np.unique(rows[rows >= 0])
            found = [self._nearest(index, index.rows.take(queried), queried, k) for index in self._index.values()]
            near = np.unique(np.concatenate([near[~np.isneginf(scores)] for scores, near in found]))
            return self._knowledge(self._trusted(near), rows)

    def search(self, queries: np.ndarray, k: int, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
        """The nearest rows to free queries [n, dim] by `modality`.

        Returns:
            scores float32 and ids int64, both [n, min(k, rows)], best first. Rows without an audio half come last where
            audio is compared, at minus infinity.
        """
        with self._lock:
            self._counts["searches"] += 1
            scores, rows = self._index[modality].search(queries, k)
            if modality == "audio" and not self._heard[rows].all():
                scores = np.where(self._heard[rows], scores, -np.inf)
                order = np.argsort(-scores, axis=1, kind="stable")
                scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
            return scores, self._meta["ids"][rows]

    def maintain(self, seed: int = 0) -> bool:
        """Train inverted files where that is due: the first ones, when the bank has doubled, when much of it was
        written since, or when recall has fallen.

        They are built aside, one modality after the other; searches and writes go on meanwhile. To be called now and
        then; does nothing where every search is exact, or while another call is at it.

        Args:
            seed: of the k-means.

        Returns:
            Whether a new one was taken.
        """
        if not self._maintenance.acquire(blocking=False):
            return False
        try:
            # One after the other: a file that is being built takes the memory of a second one.
            return any([self._maintain(name, index, seed) for name, index in self._index.items()])
        finally:
            self._maintenance.release()

    def snapshot(self, dtype: DTypeLike | None = None) -> Snapshot:
        """A copy of every row at one moment, its embeddings as they are stored or in another dtype."""
        with self._lock:
            return self._copy(dtype or self._dtype)

    def commit(self, commit: Commit) -> CommitResult:
        """Write corrected rows, each only if its version is still the corrected one; begins a new generation.

        Rows come to unit length; rows with a non-finite value are skipped, and a commit that it does not take.

        Raises:
            InputError: wrong shapes; then nothing is written.
        """
        self._check_shapes(commit.ids, commit.audio, commit.text)
        finite = np.isfinite(commit.audio).all(1) & np.isfinite(commit.text).all(1)
        audio, text = (self._stored(values) for values in (commit.audio, commit.text))
        with self._lock:
            if not self.takes(commit):
                return CommitResult(0, len(commit.ids), self._generation)
            rows = self._rows(commit.ids)
            keep = finite & (rows >= 0)
            keep[keep] = self._meta["version"][rows[keep]] == commit.versions[keep]
            self._write(rows[keep], audio[keep], text[keep], commit.frame)
            self._generation += 1
            if commit.prototypes is not None:
                self._prototypes = Prototypes(commit.prototypes, self._generation)
            return CommitResult(int(keep.sum()), int((~keep).sum()), self._generation)

    def takes(self, commit: Commit) -> bool:
        """Whether it is of this life of the bank: versions of another may be the same and mean other rows."""
        return commit.life in ("", self._life)

    def metrics(self) -> dict[str, float]:
        """Sizes and counts since the start: `bank/rows`, `bank/staleness` (mean global steps) and so on."""
        with self._lock:
            age = self._newest_step - self._meta["frame"][: len(self)]
            too_old = float((age > self._max_age).mean()) if len(self) and self._max_age is not None else 0.0
            counts = {f"bank/{name}": float(self._counts[name]) for name in COUNTERS}
            counts["bank/external_rows"] = float((self._meta["step"][: len(self)] == EXTERNAL).sum())
            counts["bank/given"] = float(self._counts["given"])
            counts["bank/external_share"] = self._counts["external_given"] / max(1, self._counts["given"])
            counts["bank/inverted_rows"] = float(min(index.trained_rows for index in self._index.values()))
            counts |= {f"bank/recall_{name}": recall for name, recall in self._recall.items()}
            return {
                "bank/rows": float(len(self)),
                "bank/staleness": float(age.mean()) if len(self) else 0.0,
                "bank/too_old_share": too_old,
                "bank/generation": float(self._generation),
                **counts,
            }

    def state(self) -> State:
        """All that a checkpoint needs, as flat named arrays."""
        with self._lock:
            state: State = {name: np.asarray(value) for name, value in vars(self._copy(self._dtype)).items()}
            del state["life"]
            state["counts"] = np.array([self._counts[name] for name in COUNTERS])
            if self._prototypes is not None:
                state["prototypes.generation"] = np.array(self._prototypes.generation)
                for level, (audio, text) in enumerate(self._prototypes.levels):
                    state[f"prototypes.{level}.audio"], state[f"prototypes.{level}.text"] = audio, text
        return state

    @classmethod
    def from_state(cls, state: State, *, dim: int, capacity: int, **settings) -> Self:
        """A bank with the rows, counters and prototypes of `state()`; the other arguments as for the constructor.

        Embeddings that are writable become the bank's own: they take no memory twice, and are not to be used elsewhere.

        Raises:
            InputError: the state's width or size does not fit.
        """
        bank = cls(dim, capacity, **settings)
        bank._check_shapes(state["ids"], state["audio"], state["text"])
        rows = bank._with_new_rows(state["ids"], np.full(len(state["ids"]), -1), np.ones(len(state["ids"]), bool))
        for modality, index in bank._index.items():
            index.adopt(state[modality])
        bank._note(rows, state["audio"], 0)
        for name in PER_ROW:
            bank._meta[name][rows] = state[name]
        bank._newest_step, bank._generation = int(state["newest_step"]), int(state["generation"])
        bank._counts.update(dict(zip(COUNTERS, state["counts"].tolist(), strict=True)))
        if "prototypes.generation" in state:
            count = sum(name.startswith("prototypes.") for name in state) // 2
            levels = [(state[f"prototypes.{i}.audio"], state[f"prototypes.{i}.text"]) for i in range(count)]
            bank._prototypes = Prototypes(levels, int(state["prototypes.generation"]))
        return bank

    def _maintain(self, name: str, index: ExactIndex | InvertedIndex, seed: int) -> bool:
        if isinstance(index, ExactIndex) or len(self) < self._inverted_from:
            return False
        if not index.is_due():
            self._recall[name] = index.recall(self._lock)
            if not index.has_fallen(self._recall[name], self._wanted_recall):
                return False
        aim = (1.0 + self._wanted_recall) / 2  # above what is wanted, so that the next look does not fall below
        self._recall[name] = index.rebuild(self._lock, seed, aim)
        return True

    def _copy(self, dtype: DTypeLike) -> Snapshot:
        return Snapshot(
            audio=self._index["audio"].rows.copy(dtype),
            text=self._index["text"].rows.copy(dtype),
            generation=self._generation,
            newest_step=self._newest_step,
            life=self._life,
            **{name: values[: len(self)].copy() for name, values in self._meta.items()},
        )

    def _check_shapes(self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray) -> None:
        wanted = (len(ids), self._dim)
        if audio.shape != wanted or text.shape != wanted:
            raise InputError(
                f"rows of shape {audio.shape} (audio) and {text.shape} (text), the bank takes {wanted}: "
                "give one row an id, as wide as the model's embeddings"
            )

    def _stored(self, values: np.ndarray) -> np.ndarray:
        """Rows [n, dim] at unit length in the bank's precision, a block at a time to need no more memory than that."""
        stored = np.empty(values.shape, self._dtype)
        with np.errstate(invalid="ignore"):  # a row that is not finite is left out later
            for first in range(0, len(values), BLOCK_ROWS):
                stored[first : first + BLOCK_ROWS] = unit_rows(values[first : first + BLOCK_ROWS])
        return stored

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        return np.fromiter((self._row_of.get(i, -1) for i in ids.tolist()), np.int64, len(ids))

    def _with_new_rows(self, ids: np.ndarray, rows: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """The row of each kept id; ids without one (-1) get the next free rows."""
        count, new = len(self), keep & (rows < 0)
        total = count + int(new.sum())
        if total > self._capacity:
            raise InputError(f"{total} rows exceed the bank's capacity of {self._capacity}: raise bank.capacity")
        self._meta = {name: grown(values, total) for name, values in self._meta.items()}
        self._heard = grown(self._heard, total)
        rows = rows.copy()
        rows[new] = np.arange(count, total)
        self._meta["ids"][rows[new]] = ids[new]
        self._meta["reliability"][rows[new]] = -1.0
        self._row_of.update(zip(ids[new].tolist(), rows[new].tolist(), strict=True))
        return rows[keep]

    def _write(self, rows: np.ndarray, audio: np.ndarray, text: np.ndarray, frame: int) -> None:
        for modality, values in (("audio", audio), ("text", text)):
            self._index[modality].write(rows, values)
        self._note(rows, audio, frame)

    def _note(self, rows: np.ndarray, audio: np.ndarray, frame: int) -> None:
        """After a write: what follows from it."""
        self._heard[rows] = any_value(audio)
        self._meta["frame"][rows] = frame
        self._meta["version"][rows] += 1

    def _nearest(
        self, index: ExactIndex | InvertedIndex, queries: np.ndarray, excluded: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows to each query, `excluded` ones left out before counting to k.

        A row of zeros finds nothing. By audio, a row without that half stands where its cosine of 0 puts it, and is
        then left out.

        Returns:
            scores float32 and rows int64, both [n, k], best first; where there are fewer, or none is left, the score is
            -inf.
        """
        scores, rows = first_allowed(*index.search(queries, k + SPARE_NEIGHBOURS), excluded, k)
        short = np.isneginf(scores).any(axis=1)
        if short.any():
            scores[short], rows[short] = first_allowed(*index.search(queries[short], k + len(excluded)), excluded, k)
        scores[~queries.any(axis=1)] = -np.inf
        if index is self._index["audio"] and len(self):
            scores[~self._heard[rows]] = -np.inf
        return scores, rows

    def _trusted(self, rows: np.ndarray) -> np.ndarray:
        reliability = self._meta["reliability"][rows]
        keep = (reliability >= self._minimum_reliability) | (reliability < 0)
        if self._max_age is not None:
            keep &= self._newest_step - self._meta["frame"][rows] <= self._max_age
        given = rows[keep]
        self._counts["given"] += len(given)
        self._counts["external_given"] += int((self._meta["step"][given] == EXTERNAL).sum())
        return given

    def _knowledge(self, rows: np.ndarray, asked: np.ndarray) -> Knowledge:
        known = asked >= 0
        own = {}
        for modality, index in self._index.items():
            own[modality] = np.zeros((len(asked), self._dim), np.float16)
            own[modality][known] = index.rows.take(asked[known])
        own_age, own_reliability = np.full(len(asked), -1), np.full(len(asked), -1.0, np.float32)
        own_age[known] = self._newest_step - self._meta["frame"][asked[known]]
        own_reliability[known] = self._meta["reliability"][asked[known]]
        return Knowledge(
            ids=self._meta["ids"][rows],
            audio=self._index["audio"].rows.take(rows).astype(np.float16, copy=False),
            text=self._index["text"].rows.take(rows).astype(np.float16, copy=False),
            reliability=self._meta["reliability"][rows],
            age=self._newest_step - self._meta["frame"][rows],
            own_audio=own["audio"],
            own_text=own["text"],
            own_age=own_age,
            own_reliability=own_reliability,
            generation=self._generation,
            rows=len(self),
            newest_step=self._newest_step,
        )
