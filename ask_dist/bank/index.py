"""Inner-product search, exact or by an inverted file, and spherical k-means. The only module that imports FAISS."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

MAX_GPU_NEIGHBOURS = 2048  # FAISS's own limit on k for its GPU search
GPU_SCRATCH_BYTES = 256 * 2**20  # FAISS would reserve about 1.5 GB, which the encoders need more
KMEANS_ITERATIONS = 20
# Of an inverted file: lists a square root of the rows, and what its k-means may cost.
LISTS, LIST_ITERATIONS, ROWS_A_LIST = 2.0, 10, 64


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
    def trained_rows(self) -> int:
        """Rows that an inverted file was trained for: none."""
        return 0

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


class InvertedIndex(ExactIndex):
    """Approximate search by an inverted file (FAISS's IVF-Flat) beside the matrix, which stays the truth.

    Search is exact until `take` was called. A row that is written moves to its new list at once; only the centroids
    stay as they were trained, so recall falls as the rows drift, until the next one is built.

    Args:
        probes: lists that a search looks into, until `take` finds that it needs more. The others as for `ExactIndex`.
    """

    def __init__(self, dim: int, threads: int = 1, *, probes: int) -> None:
        super().__init__(dim, threads)
        self._least_probes = self._probes = probes
        self._trained_rows = 0
        self._inverted: Any = None
        self._written: list[np.ndarray] | None = None  # since `copied`

    @property
    def trained_rows(self) -> int:
        """Rows that the inverted file was trained for; 0 before there is one."""
        return self._trained_rows

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        super().write(positions, values)
        if self._inverted is not None:
            self._move(self._inverted, positions)
        if self._written is not None:
            self._written.append(positions)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `ExactIndex.search`, but a near row whose list is not looked into is missed."""
        k = min(k, self._count)
        if self._inverted is None or k == 0 or len(queries) == 0:
            return super().search(queries, k)
        set_threads(self._threads)
        # Not as a parameter of the search: the search that faiss.contrib.torch_utils puts in its place takes none.
        self._inverted.nprobe = self._probes
        scores, positions = self._inverted.search(np.ascontiguousarray(queries, np.float32), k)
        short = (positions < 0).any(axis=1)  # the lists that were looked into hold fewer than k rows
        if short.any():
            scores[short], positions[short] = super().search(queries[short], k)
        return scores, positions

    def recall(self, queries: np.ndarray, k: int) -> float:
        """The share of the k nearest that `search` finds: of its answers, those no farther than the kth of an exact
        search, since equally near rows are as good as each other."""
        return self._found(queries, super().search(queries, k)[0])

    def copied(self) -> np.ndarray:
        """The rows, float32 [count, dim], for `inverted_file`; from now on it is noted what is written."""
        self._written = []
        return self.rows.copy()

    def take(self, inverted: Any, queries: np.ndarray, k: int, aim: float) -> float:
        """Let an inverted file of the last `copied` answer from now on, with what was written since moved.

        Args:
            inverted: of `inverted_file`.
            queries, k: what its recall is measured with.
            aim: recall that is to be reached; probes are doubled until it is.

        Returns:
            The recall.
        """
        trained, written = inverted.ntotal, self._written
        self._written = None
        if written:
            self._move(inverted, np.unique(np.concatenate(written)))
        self._inverted, self._trained_rows, self._probes = inverted, trained, self._least_probes
        nearest = super().search(queries, k)[0]
        while (recall := self._found(queries, nearest)) < aim and self._probes < inverted.nlist:
            self._probes *= 2
        return recall

    def forget(self) -> None:
        """Note no longer what is written: the inverted file that was being built will not come."""
        self._written = None

    def _found(self, queries: np.ndarray, nearest: np.ndarray) -> float:
        scores = self.search(queries, nearest.shape[1])[0]
        return float((scores >= nearest[:, -1:] - 1e-5).mean())

    def _move(self, inverted: Any, positions: np.ndarray) -> None:
        set_threads(self._threads)
        known = positions[positions < inverted.ntotal]
        if len(known):
            inverted.update_vectors(known, self._matrix[known])
        if inverted.ntotal < self._count:
            inverted.add(self._matrix[inverted.ntotal : self._count])


def inverted_file(rows: np.ndarray, seed: int, threads: int = 1) -> Any:
    """An IVF-Flat index of rows [n, d], float32, n at least 1, whose rows can be moved between its lists."""
    set_threads(threads)
    lists = max(1, min(len(rows) // 2, round(LISTS * len(rows) ** 0.5)))
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    settings = inverted.cp
    settings.spherical, settings.seed, settings.niter = True, seed, LIST_ITERATIONS
    settings.max_points_per_centroid, settings.min_points_per_centroid = ROWS_A_LIST, 1
    inverted.train(rows)
    inverted.set_direct_map_type(faiss.DirectMap.Array)  # type: ignore[attr-defined]
    inverted.add(rows)
    return inverted


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
