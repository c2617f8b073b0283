"""Exact inner-product search and spherical k-means. The only module that imports FAISS."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

MAX_GPU_NEIGHBOURS = 2048  # FAISS's own limit on k for its GPU search
GPU_SCRATCH_BYTES = 256 * 2**20  # FAISS would reserve about 1.5 GB, which the encoders need more
KMEANS_ITERATIONS = 20


def set_threads(threads: int) -> None:
    """Let FAISS use `threads` CPU threads for calls made by the calling thread.

    OpenMP keeps this number per calling thread, so it is set before each call rather than once a process.
    """
    faiss.omp_set_num_threads(threads)


def exact_search(queries: np.ndarray, rows: np.ndarray, k: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k rows with the largest inner product with each query, best first.

    Args:
        queries: [n, d], any float dtype.
        rows: [m, d] float32; searched without a copy if contiguous.
        k: neighbours asked for; min(k, m) come back.

    Returns:
        scores float32 and positions int64, both [n, min(k, m)].
    """
    k = min(k, len(rows))
    if k == 0 or len(queries) == 0:
        return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    set_threads(threads)
    return faiss.knn(queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)


def spherical_kmeans(rows: np.ndarray, clusters: int, seed: int, threads: int = 1) -> np.ndarray:
    """The cluster, int64 [n], of each row of [n, d] after k-means with unit-length centroids."""
    set_threads(threads)
    rows = np.ascontiguousarray(rows, np.float32)
    kmeans: Any = faiss.Kmeans(
        rows.shape[1], clusters, niter=KMEANS_ITERATIONS, seed=seed, spherical=True, min_points_per_centroid=1
    )
    kmeans.train(rows)
    return exact_search(rows, kmeans.centroids, 1, threads)[1][:, 0]


class ExactIndex:
    """A growing float32 matrix of rows with exact search over it.

    The host matrix is what callers read; where FAISS sees a GPU a copy lives there, told about every written row, and
    answers the searches. Not thread-safe: the bank's lock guards it.
    """

    def __init__(self, dim: int, threads: int = 1) -> None:
        self._matrix = np.empty((0, dim), np.float32)
        self._count = 0
        self._threads = threads
        self._device = _DeviceRows(dim) if faiss.get_num_gpus() > 0 else None

    @property
    def rows(self) -> np.ndarray:
        """The rows written so far, float32 [count, dim]: a view, to be read under the owner's lock."""
        return self._matrix[: self._count]

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Set rows [n] to values [n, dim]; positions past the end extend the matrix, without gaps."""
        if len(positions) == 0:
            return
        self._count = max(self._count, int(positions.max()) + 1)
        self._matrix = grown(self._matrix, self._count)
        self._matrix[positions] = values
        if self._device is not None:
            self._device.write(positions, self._matrix[positions], len(self._matrix))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `exact_search` over the rows. Beyond the GPU's limit on k the host answers."""
        k = min(k, self._count)
        if self._device is not None and 0 < k <= MAX_GPU_NEIGHBOURS and len(queries) > 0:
            return self._device.search(queries, self._count, k)
        return exact_search(queries, self.rows, k, self._threads)


def grown(array: np.ndarray, needed: int) -> np.ndarray:
    """The array itself, or a copy at least twice as long if it has fewer than `needed` rows."""
    if needed <= len(array):
        return array
    larger = np.zeros((max(needed, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


class _DeviceRows:
    """The rows as a torch tensor on the GPU, overwritten in place: a FAISS GPU index could only be rebuilt."""

    def __init__(self, dim: int) -> None:
        # torch costs seconds to import, so only a process that has a GPU pays for it.
        import faiss.contrib.torch_utils  # teaches faiss.knn_gpu about tensors
        import torch

        self._torch: Any = torch
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(GPU_SCRATCH_BYTES)
        self._tensor = torch.empty((0, dim), dtype=torch.float32, device="cuda")

    def write(self, positions: np.ndarray, values: np.ndarray, size: int) -> None:
        if size > len(self._tensor):
            larger = self._tensor.new_empty((size, self._tensor.shape[1]))
            larger[: len(self._tensor)] = self._tensor
            self._tensor = larger
        self._tensor[self._torch.from_numpy(positions).cuda()] = self._torch.from_numpy(values).cuda()

    def search(self, queries: np.ndarray, count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        on_device = self._torch.from_numpy(np.ascontiguousarray(queries, np.float32)).cuda()
        scores, positions = faiss.knn_gpu(
            self._resources, on_device, self._tensor[:count], k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return scores.cpu().numpy(), positions.cpu().numpy()
