"""Coarse knowledge: paired prototypes of the bank at several granularities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ask_dist.bank.index import spherical_kmeans


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
    pairs = np.concatenate([audio, text], axis=1).astype(np.float32) / np.sqrt(np.float32(2))
    built = []
    for clusters in levels:
        if clusters > len(pairs):
            continue
        members = spherical_kmeans(pairs, clusters, seed, threads)
        used = np.unique(members)
        built.append((_cluster_means(audio, members, clusters)[used], _cluster_means(text, members, clusters)[used]))
    return built


def unit_rows(values: np.ndarray) -> np.ndarray:
    """The rows of [n, d] at unit length, in float32; a zero row stays zero."""
    values = np.asarray(values, np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _cluster_means(values: np.ndarray, members: np.ndarray, clusters: int) -> np.ndarray:
    sums = np.zeros((clusters, values.shape[1]), np.float32)
    np.add.at(sums, members, values.astype(np.float32))
    return unit_rows(sums).astype(np.float16)
