"""Coarse knowledge: paired prototypes of the bank at several granularities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ask_dist.bank.index import exact_search, spherical_kmeans
from ask_dist.bank.rows import BLOCK_ROWS

ROWS_A_CLUSTER = 256  # to learn a centroid from; all of a million rows would tell it hardly better


@dataclass(frozen=True)
class Prototypes:
    """Paired prototypes, coarsest level first as configured.

    Attributes:
        levels: per granularity (audio [p, d], text [p, d]) in float16, unit length; row j of both is one cluster.
        generation: the bank's generation when they were committed.
    """

    levels: list[tuple[np.ndarray, np.ndarray]]
    generation: int


def build_prototypes(
    audio: np.ndarray, text: np.ndarray, levels: Sequence[int], seed: int, threads: int = 1
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Spherical k-means over both modalities at once, then each cluster's mean audio and mean text.

    Args:
        audio, text: [n, d] unit rows; row j of both is one pair.
        levels: prototypes per granularity; a level that asks for more prototypes than there are rows is left out.

    Returns:
        As `Prototypes.levels`. A cluster that ended up empty is left out.
    """
    built = []
    for clusters in levels:
        if clusters > len(audio):
            continue
        chosen = np.arange(len(audio))
        if len(audio) > ROWS_A_CLUSTER * clusters:
            rng = np.random.default_rng(seed)
            chosen = np.sort(rng.choice(chosen, ROWS_A_CLUSTER * clusters, replace=False))
        centroids = spherical_kmeans(_pairs(audio[chosen], text[chosen]), clusters, seed, threads)
        built.append(_cluster_means(audio, text, centroids, threads))
    return built


def unit_rows(values: np.ndarray) -> np.ndarray:
    """The rows of [n, d] at unit length, in float32; a zero row stays zero."""
    values = np.asarray(values, np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _pairs(audio: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Rows [n, 2 d] of unit length whose inner products are the mean of both modalities'."""
    return np.concatenate([audio, text], axis=1).astype(np.float32) / np.sqrt(np.float32(2))


def _cluster_means(
    audio: np.ndarray, text: np.ndarray, centroids: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean audio and mean text of the rows nearest to each centroid, a block of rows at a time."""
    sums = np.zeros((2, len(centroids), audio.shape[1]), np.float32)
    sizes = np.zeros(len(centroids), np.int64)
    for first in range(0, len(audio), BLOCK_ROWS):
        part = slice(first, first + BLOCK_ROWS)
        members = exact_search(_pairs(audio[part], text[part]), centroids, 1, threads)[1][:, 0]
        sizes += np.bincount(members, minlength=len(centroids))
        for total, values in zip(sums, (audio, text), strict=True):
            np.add.at(total, members, values[part].astype(np.float32))
    mean_audio, mean_text = (unit_rows(total[sizes > 0]).astype(np.float16) for total in sums)
    return mean_audio, mean_text
