"""Approximate search by inverted files beside the rows, which stay the truth."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ask_dist.bank.index import (
    LEAST_ROWS,
    MAX_GPU_NEIGHBOURS,
    ExactIndex,
    FileKind,
    centres,
    listed_rows,
    merged,
    places,
    search_rows,
    set_threads,
    trained_file,
)
from ask_dist.bank.prototypes import unit_rows
from ask_dist.bank.rows import BLOCK_ROWS, Rows

LISTS, ROWS_A_LIST = 2.0, 64  # lists a square root of the rows, and rows that a list's centroid is learned from
# Rows written since a file was built, at most, as a share of all. Beyond it every search is exact until the next file:
# going through so many one by one and then the file as well would hardly be quicker.
FRESH_SHARE = 0.2
MOVED_AT_ONCE = 5 * 10**10  # rows x lists x width: a second of one core, during which nobody can search
CATCH_UPS = 2
# Of the lists: a search that looks into more takes as long as an exact one. It may always look into a few.
PAYING_SHARE, PAYING_LISTS = 0.25, 64
CANDIDATES, MOST_CANDIDATES = 8, 128  # of a product quantizer, for one that is wanted
# Queries and neighbours by which recall is told, and by how much it may differ between two samples.
RECALL_QUERIES, RECALL_NEIGHBOURS, RECALL_NOISE = 64, 16, 0.02
LOOKED_AT = 16  # rows for a query: where most have no such half, queries are taken from those that have


class InvertedIndex:
    """Rows with approximate search over them by an inverted file.

    Search is exact until `rebuild` was called. A row that is written since is found by its new value all the same:
    where the file can move rows between its lists it moves at once, or, of many rows at once, gets its new value in the
    list where it is; where the file can't (a product quantizer's codes, anything on a GPU), its answer for the row no
    longer counts and the row is searched exactly beside it. Not thread-safe: the owner's lock guards it.

    Args:
        kind: of the file. probes: lists that a search looks into, until `rebuild` finds that it needs more.
    """

    def __init__(
        self,
        dim: int,
        dtype: DTypeLike = np.float32,
        threads: int = 1,
        gpu: bool = False,
        *,
        kind: FileKind,
        probes: int,
    ) -> None:
        self.rows = Rows(dim, dtype)
        self._kind: FileKind = kind
        self._threads, self._gpu, self._probes = threads, gpu, probes
        self._file: InvertedFile | None = None
        self._fresh = FreshRows(dim, threads, gpu)
        self._written: list[np.ndarray] | None = None  # since a rebuild began
        self._reached = 1.0
        self._settled = 0  # rows when a file was last tried; 0 if another is due anyway
        self._changes = 0  # rows written since, while there is no file

    @property
    def trained_rows(self) -> int:
        """Rows that the file was trained for; 0 while search is exact."""
        return 0 if self._file is None else self._file.trained_rows

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        """As `Rows.write`."""
        self.rows.write(positions, values)
        if self._written is not None:
            self._written.append(positions)
        if self._file is not None:
            self._keep_up(self._file, positions)
        else:
            self._changes += len(positions)

    def adopt(self, values: np.ndarray) -> None:
        """As `Rows.adopt`."""
        self.rows.adopt(values)
        self._changes = len(values)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search_rows`, but a near row whose list is not looked into is missed."""
        k = min(k, len(self.rows))
        file = self._file
        if file is None or not 0 < k <= file.most or len(queries) == 0:
            return search_rows(queries, self.rows, k, self._threads)
        queries = np.ascontiguousarray(queries, np.float32)
        if len(self._fresh) == 0:
            scores, positions = file.search(queries, k, self.rows)
        else:
            old = self._unwritten(file, queries, k, k + max(8, k // 4))
            scores, positions = merged([old, self._fresh.search(queries, k)], len(queries), k)
        short = positions[:, -1] < 0  # the lists that were looked into hold fewer than k rows
        if short.any():
            scores[short], positions[short] = search_rows(queries[short], self.rows, k, self._threads)
        return scores, positions

    def is_due(self) -> bool:
        """Whether the last file is missing, has many rows beside it, or was trained for less than half of the rows; or
        was of no use, and all rows have changed since."""
        count = len(self.rows)
        outgrown = count > 2 * self._settled or len(self._fresh) > FRESH_SHARE / 2 * count
        return count >= LEAST_ROWS and (outgrown or self._changes > count)

    def has_fallen(self, recall: float, wanted: float) -> bool:
        """Whether a recall is below what is wanted, and below what the file reached when it was new."""
        return recall < min(wanted, self._reached - RECALL_NOISE)

    def recall(self, lock: AbstractContextManager[Any]) -> float:
        """The share of the nearest rows that `search` finds, on a sample.

        Called without the owner's lock, which is taken for the search alone. Of the answers those count that are no
        farther than the farthest of an exact search, since equally near rows are as good as each other.
        """
        if self._file is None:
            return 1.0
        queries, nearest = self._sample()
        with lock:
            return self._found(queries, nearest)

    def rebuild(self, lock: AbstractContextManager[Any], seed: int, aim: float) -> float:
        """Train and fill a file aside, then let it answer. One call at a time.

        Called without the owner's lock, which is taken for moments only: searches and writes go on meanwhile.

        Args:
            seed: of the k-means.
            aim: recall that is to be reached; more lists, and more candidates, are looked into until it is. Rows
                without clusters would need so many that search stays exact.

        Returns:
            The recall.
        """
        with lock:
            self._written = []
        try:
            file = self._filled(seed)
            for _ in range(CATCH_UPS if file.movable else 0):
                with lock:
                    written, self._written = self._written, []
                file.move(distinct(written), self.rows)
            with lock:
                self._replace(file, settled=file.trained_rows)
                self._keep_up(file, distinct(self._written))
        finally:
            with lock:
                self._written = None
        queries, nearest = self._sample()
        while True:
            with lock:
                self._reached = self._found(queries, nearest)
                if self._reached >= aim or not file.widen():
                    return self._reached
                if not file.pays and self._file is file:
                    self._replace(None, settled=file.trained_rows)
                    return 1.0

    def _replace(self, file: InvertedFile | None, settled: int) -> None:
        self._file, self._fresh = file, FreshRows(self.rows.dim, self._threads, self._gpu)
        self._settled, self._changes = settled, 0

    def _filled(self, seed: int) -> InvertedFile:
        """A file of the rows as they are. A row that is being written meanwhile may be torn; it is written once more
        when the file is caught up with."""
        count = len(self.rows)
        lists = max(1, min(count // 2, round(LISTS * count**0.5)))
        chosen = np.random.default_rng(seed).choice(
            count, min(count, max(lists * ROWS_A_LIST, LEAST_ROWS)), replace=False
        )
        sample = self.rows.take(np.sort(chosen)).astype(np.float32)
        index = trained_file(self._kind, sample, lists, self.rows.dtype, seed, self._threads, self._gpu)
        del sample
        file = InvertedFile(index, count, self._probes, self._threads, reranked=self._kind == "ivf_pq")
        for first, block in self.rows.blocks(BLOCK_ROWS):
            if first < count:
                file.add(block[: count - first])
        return file

    def _keep_up(self, file: InvertedFile, positions: np.ndarray) -> None:
        if len(self._fresh) == 0 and file.moves_quickly(len(positions)):
            file.move(positions, self.rows)
        elif len(self._fresh) == 0 and file.moves_quickly(file.unknown(positions)):
            file.overwrite(positions, self.rows)
        elif self._fresh.size_with(positions) <= FRESH_SHARE * len(self.rows):
            positions = distinct([positions])
            self._fresh.write(positions, self.rows.take(positions))
        else:
            self._replace(None, settled=0)

    def _unwritten(
        self, file: InvertedFile, queries: np.ndarray, k: int, candidates: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The file's k best rows that were not written since, out of so many candidates, or more where that is
        too few; -1 where there are no more."""
        candidates = min(candidates, file.most)
        scores, positions = file.search(queries, candidates, self.rows)
        ended = positions[:, -1] < 0
        scores[self._fresh.holds(positions)] = -np.inf
        scores, positions = merged([(scores, positions)], len(queries), k)
        short = (positions[:, -1] < 0) & ~ended
        if short.any() and candidates < min(file.most, k + len(self._fresh)):
            scores[short], positions[short] = self._unwritten(file, queries[short], k, 2 * candidates)
        return scores, positions

    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows spread over all of them, float32, and the positions nearest to each, by rows that may be changing."""
        count = len(self.rows)
        spread = self.rows.take(np.arange(0, count, max(1, count // (LOOKED_AT * RECALL_QUERIES))))
        spread = spread[spread.any(axis=1)]  # a row of zeros is near to none
        queries = spread[:: max(1, len(spread) // RECALL_QUERIES)][:RECALL_QUERIES]
        return queries, search_rows(queries, self.rows, RECALL_NEIGHBOURS, self._threads)[1]

    def _found(self, queries: np.ndarray, nearest: np.ndarray) -> float:
        if self._file is None or len(queries) == 0:
            return 1.0
        farthest = inner_products(queries, nearest, self.rows).min(axis=1, keepdims=True)
        return float((self.search(queries, nearest.shape[1])[0] >= farthest - 1e-5).mean())


class InvertedFile:
    """A trained FAISS index with lists, and how it is searched.

    Args:
        index: of `trained_file`.
        trained_rows: rows in the bank when it was trained.
        probes: lists that a search looks into.
        reranked: its scores are rough, so more candidates than are wanted are scored anew.
    """

    def __init__(self, index: Any, trained_rows: int, probes: int, threads: int, *, reranked: bool) -> None:
        self._index, self._probes, self._threads, self._reranked = index, probes, threads, reranked
        self._candidates = CANDIDATES
        self._most_probes = max(probes, PAYING_LISTS, int(PAYING_SHARE * index.nlist))
        self.trained_rows = trained_rows
        on_gpu = not hasattr(index, "direct_map")  # those of the CPU have one, used or not
        self.movable = not on_gpu and not index.direct_map.no()
        self.most = MAX_GPU_NEIGHBOURS if on_gpu else np.iinfo(np.int32).max  # neighbours that it can be asked for

    def add(self, rows: np.ndarray) -> None:
        """Append rows [n, dim]."""
        set_threads(self._threads)
        self._index.add(np.ascontiguousarray(rows, np.float32))

    def search(self, queries: np.ndarray, k: int, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions [n, k] of the k nearest to queries, float32 [n, dim], best first; -1 where the lists
        hold fewer."""
        set_threads(self._threads)
        # Not as a parameter of the search: the search that faiss.contrib.torch_utils puts in its place takes none.
        self._index.nprobe = min(self._probes, self._index.nlist, self.most)
        if not self._reranked:
            return self._index.search(queries, k)
        # No fewer than recall was measured with: among a few rough scores the best is easily missed.
        positions = self._index.search(queries, min(max(k, RECALL_NEIGHBOURS) * self._candidates, self.most))[1]
        return merged([(inner_products(queries, positions, rows), positions)], len(queries), k)

    def widen(self) -> bool:
        """Let a search look at twice as much; False if it does at all there is."""
        more_lists = self._probes < min(self._index.nlist, self.most)
        more_candidates = self._reranked and self._candidates < MOST_CANDIDATES
        self._probes *= 1 + more_lists
        self._candidates *= 1 + more_candidates
        return more_lists or more_candidates

    @property
    def pays(self) -> bool:
        """Whether its search is quicker than an exact one, as far as the lists tell that it looks into."""
        return self._probes <= self._most_probes

    def moves_quickly(self, count: int) -> bool:
        """Whether so many rows can be moved at once."""
        return self.movable and count * self._index.nlist * self._index.d <= MOVED_AT_ONCE

    def move(self, positions: np.ndarray, rows: Rows) -> None:
        """Put rows that were written into the lists where they belong now; new ones are appended."""
        set_threads(self._threads)
        known = positions[positions < self._index.ntotal]
        for first in range(0, len(known), BLOCK_ROWS):
            block = known[first : first + BLOCK_ROWS]
            self._index.update_vectors(block, rows.take(block))
        self._append(rows)

    def unknown(self, positions: np.ndarray) -> int:
        """How many of these it does not hold yet."""
        return int((positions >= self._index.ntotal).sum())

    def overwrite(self, positions: np.ndarray, rows: Rows) -> None:
        """Give rows that were written their new values in the lists where they are; new ones are appended.

        A commit moves neighbours alike, so they are found together as before, by the mean of what the list now holds.
        Where they drift apart, recall tells.
        """
        known = positions[positions < self._index.ntotal]
        lists, place = (values[known] for values in places(self._index))
        order, middles = np.argsort(lists, kind="stable"), centres(self._index)
        for chosen in np.split(order, np.flatnonzero(np.diff(lists[order])) + 1) if len(known) else ():
            number = int(lists[chosen[0]])
            held = listed_rows(self._index, number, rows.dtype)
            held[place[chosen]] = rows.take(known[chosen])
            middles[number] = unit_rows(held.mean(axis=0, dtype=np.float32, keepdims=True))[0]
        self._append(rows)

    def _append(self, rows: Rows) -> None:
        for first in range(self._index.ntotal, len(rows), BLOCK_ROWS):
            self.add(rows.take(np.arange(first, min(first + BLOCK_ROWS, len(rows)))))


class FreshRows:
    """Rows written since a file was built, searched exactly beside it; positions are those of the whole."""

    def __init__(self, dim: int, threads: int, gpu: bool = False) -> None:
        self._index = ExactIndex(dim, np.float32, threads, gpu)
        self._positions = np.zeros(0, np.int64)  # of each entry
        self._entries = np.zeros(0, np.int64)  # of each position; -1 where it has none

    def __len__(self) -> int:
        return len(self._index.rows)

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """Which of the positions, of any shape, are among them; -1 is not."""
        known = (positions >= 0) & (positions < len(self._entries))
        known[known] = self._entries[positions[known]] >= 0
        return known

    def size_with(self, positions: np.ndarray) -> int:
        """Rows there will be once these, int64 [n], were written."""
        return len(self) + int((~self.holds(positions)).sum())

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Set the rows at positions int64 [n], no two equal, to values [n, dim]."""
        end = int(positions.max(initial=-1)) + 1
        if end > len(self._entries):
            self._entries = np.append(self._entries, np.full(end - len(self._entries), -1))
        new = positions[self._entries[positions] < 0]
        self._entries[new] = np.arange(len(self), len(self) + len(new))
        self._positions = np.append(self._positions, new)
        self._index.write(self._entries[positions], values)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search_rows` over these rows."""
        scores, entries = self._index.search(queries, k)
        return scores, self._positions[entries]


def inner_products(queries: np.ndarray, positions: np.ndarray, rows: Rows) -> np.ndarray:
    """Scores float32 [n, m] of queries [n, dim] with the rows at positions [n, m]; -inf where that is -1."""
    scores = np.empty(positions.shape, np.float32)
    queries = queries.astype(np.float32, copy=False)
    together = max(1, BLOCK_ROWS // positions.shape[1])
    for first in range(0, len(queries), together):
        part = slice(first, first + together)
        values = rows.take(np.maximum(positions[part], 0).ravel()).astype(np.float32)
        scores[part] = (values.reshape(*positions[part].shape, -1) @ queries[part, :, None])[..., 0]
    scores[positions < 0] = -np.inf
    return scores


def distinct(written: list[np.ndarray]) -> np.ndarray:
    """The positions of several writes, each once."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *written]))
