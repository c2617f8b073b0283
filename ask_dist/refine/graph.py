"""Edges from the bank's own exact search, so that no graph library has to search again."""

from __future__ import annotations

import numpy as np

from ask_dist.bank.index import exact_search


def nearest(targets: np.ndarray, sources: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
    """The k nearest sources of each target by inner product: [n, d], [m, d] float32 -> int64 [n, min(k, m)]."""
    return exact_search(targets, sources, k, threads)[1]


def nearest_others(rows: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
    """The k nearest *other* rows of each row: [n, d] float32 -> int64 [n, min(k, n - 1)]."""
    found = nearest(rows, rows, k + 1, threads)
    others = found != np.arange(len(rows))[:, None]
    others[others.all(axis=1), -1] = False  # more than k equal rows can push the row itself out of its own list
    return found[others].reshape(len(rows), found.shape[1] - 1)


def edges(neighbours: np.ndarray) -> np.ndarray:
    """Directed edges [2, n * k] from each of a target's neighbours int64 [n, k] (first row) to it (second row)."""
    targets = np.repeat(np.arange(len(neighbours)), neighbours.shape[1])
    return np.stack([neighbours.reshape(-1), targets])
