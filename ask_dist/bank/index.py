"""Exact inner-product search, files for approximate search, and k-means. The only module that imports FAISS."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import DTypeLike

from ask_dist.bank.rows import CHUNK_ROWS, Rows

FileKind = Literal["ivf_flat", "ivf_pq"]

MAX_GPU_NEIGHBOURS = 2048  # FAISS's own limit on k for its GPU search
GPU_SCRATCH_BYTES = 256 * 2**20  # FAISS would reserve about 1.5 GB, which the encoders need more
GPU_PIECES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)  # of a product quantizer; FAISS's kernels
KMEANS_ITERATIONS, LIST_ITERATIONS = 20, 10
LEAST_ROWS = 256  # the values of a byte: a product quantizer learns from no fewer


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


def search_rows(queries: np.ndarray, rows: Rows, k: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """As `exact_search`, over rows that lie in chunks."""
    k = min(k, len(rows))
    if len(rows) <= CHUNK_ROWS and rows.dtype == np.float32:
        return exact_search(queries, next(rows.blocks(), (0, np.empty((0, rows.dim), np.float32)))[1], k, threads)
    if k == 0 or len(queries) == 0:
        return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    queries = np.ascontiguousarray(queries, np.float32)
    found = ((first, exact_search(queries, block, k, threads)) for first, block in rows.float_blocks())
    return merged(((scores, first + positions) for first, (scores, positions) in found), len(queries), k)


def merged(answers: Iterable[tuple[np.ndarray, np.ndarray]], queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several answers to the same queries, best first.

    Args:
        answers: scores and positions [queries, m], in any order, of any m; a score of -inf is no answer.

    Returns:
        scores float32 and positions int64, both [queries, k]; position -1 where there are fewer.
    """
    heap: Any = faiss.ResultHeap(queries, k, keep_max=True)
    for scores, positions in answers:
        heap.add_result(scores, positions)
    heap.finalize()
    return heap.D, heap.I


def first_allowed(scores: np.ndarray, rows: np.ndarray, excluded: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each query's rows [n, m] that are not excluded; fewer are filled up with scores of -inf."""
    scores = np.where(np.isin(rows, excluded), -np.inf, scores).astype(np.float32, copy=False)
    order = np.argsort(np.isneginf(scores), axis=1, kind="stable")[:, :k]
    fill = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(np.take_along_axis(scores, order, 1), fill, constant_values=-np.inf),
        np.pad(np.take_along_axis(rows, order, 1), fill),
    )


def spherical_kmeans(rows: np.ndarray, clusters: int, seed: int, threads: int = 1) -> np.ndarray:
    """The centroids, float32 [clusters, d] of unit length, that k-means finds among rows [n, d]."""
    set_threads(threads)
    kmeans: Any = faiss.Kmeans(
        rows.shape[1], clusters, niter=KMEANS_ITERATIONS, seed=seed, spherical=True, min_points_per_centroid=1
    )
    kmeans.train(np.ascontiguousarray(rows, np.float32))
    return kmeans.centroids


def sees_gpu() -> bool:
    """Whether FAISS could search on a GPU here."""
    return faiss.get_num_gpus() > 0


class ExactIndex:
    """Rows with exact search over them.

    The host's rows are what callers read; with `gpu`, where FAISS sees one, a float32 copy lives there, told about
    every written row, and answers the searches. Not thread-safe: the bank's lock guards it.
    """

    def __init__(self, dim: int, dtype: DTypeLike = np.float32, threads: int = 1, gpu: bool = False) -> None:
        self.rows = Rows(dim, dtype)
        self._threads = threads
        self._device = _DeviceRows(dim) if gpu and sees_gpu() else None

    @property
    def trained_rows(self) -> int:
        """Rows that an inverted file was trained for: none."""
        return 0

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        """As `Rows.write`."""
        self.rows.write(positions, values)
        if self._device is not None and len(positions) > 0:
            self._device.write(positions, self.rows.take(positions), len(self.rows))

    def adopt(self, values: np.ndarray) -> None:
        """As `Rows.adopt`."""
        self.rows.adopt(values)
        if self._device is not None and len(values) > 0:
            self._device.write(np.arange(len(values)), values, len(values))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search_rows`. Beyond the GPU's limit on k the host answers."""
        k = min(k, len(self.rows))
        if self._device is not None and 0 < k <= MAX_GPU_NEIGHBOURS and len(queries) > 0:
            return self._device.search(queries, len(self.rows), k)
        return search_rows(queries, self.rows, k, self._threads)


def trained_file(
    kind: FileKind, rows: np.ndarray, lists: int, dtype: DTypeLike, seed: int, threads: int = 1, gpu: bool = False
) -> Any:
    """An inverted file without rows, for the inner product; with `gpu` there, where FAISS sees one.

    Args:
        kind: "ivf_flat" holds rows as they are; "ivf_pq" the codes of a product quantizer, 4 bits for 4 numbers on the
            CPU (laid out for its registers), a byte for as few as the GPU's kernels allow there.
        rows: to learn from, float32 [n, dim], n at least 2 `lists` and `LEAST_ROWS`.
        dtype: that "ivf_flat" holds rows in.
        seed: of the k-means.
    """
    set_threads(threads)
    on_gpu, dim = gpu and sees_gpu(), rows.shape[1]
    quantizer, metric = faiss.IndexFlatIP(dim), faiss.METRIC_INNER_PRODUCT
    file: Any
    if kind == "ivf_pq":
        if on_gpu:
            pieces = max(size for size in GPU_PIECES if dim % size == 0)
            file = faiss.IndexIVFPQ(quantizer, dim, lists, pieces, 8, metric)
        else:
            file = faiss.IndexIVFPQFastScan(quantizer, dim, lists, dim // math.gcd(dim, 4), 4, metric)
        file.pq.cp.seed, file.pq.cp.min_points_per_centroid = seed, 1
    elif np.dtype(dtype) == np.float16:
        half = faiss.ScalarQuantizer.QT_fp16
        file = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, half, metric, False)
    else:
        file = faiss.IndexIVFFlat(quantizer, dim, lists, metric)
    file.cp.spherical, file.cp.seed, file.cp.niter = True, seed, LIST_ITERATIONS
    file.cp.max_points_per_centroid, file.cp.min_points_per_centroid = len(rows), 1
    file.train(rows)
    if on_gpu:
        options: Any = faiss.GpuClonerOptions()
        options.useFloat16 = True  # of the product quantizer's tables, which would not fit otherwise
        return faiss.index_cpu_to_gpu(_gpu_resources(), 0, file, options)
    if kind == "ivf_flat":
        # It then knows where each row is, and can move it.
        file.set_direct_map_type(faiss.DirectMap.Array)  # type: ignore[attr-defined]
    return file


def places(file: Any) -> tuple[np.ndarray, np.ndarray]:
    """The list that each row of an "ivf_flat" file on the CPU is in, and its place there: int64 [n] twice."""
    both = faiss.vector_to_array(file.direct_map.array)
    return both >> 32, both & 0xFFFFFFFF


def listed_rows(file: Any, number: int, dtype: DTypeLike) -> np.ndarray:
    """The rows [n, dim] in a list of an "ivf_flat" file on the CPU, to be read and overwritten."""
    codes = file.invlists.get_codes(number)
    size = file.invlists.list_size(number) * file.invlists.code_size
    return faiss.rev_swig_ptr(codes, size).view(dtype).reshape(-1, file.d)  # type: ignore[attr-defined]


def centres(file: Any) -> np.ndarray:
    """The centres float32 [lists, dim] by which lists are looked up, to be read and overwritten."""
    flat = faiss.downcast_index(file.quantizer)
    return faiss.rev_swig_ptr(flat.get_xb(), file.nlist * file.d).reshape(-1, file.d)  # type: ignore[attr-defined]


def _gpu_resources() -> Any:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH_BYTES)
    return resources


class _DeviceRows:
    """The rows as a torch tensor on the GPU, overwritten in place: a FAISS GPU index could only be rebuilt."""

    def __init__(self, dim: int) -> None:
        # torch costs seconds to import, so only a process that has a GPU pays for it.
        import torch
        from faiss.contrib import torch_utils  # noqa: F401  (teaches faiss.knn_gpu about tensors)

        self._torch: Any = torch
        self._resources = _gpu_resources()
        self._tensor = torch.empty((0, dim), dtype=torch.float32, device="cuda")

    def write(self, positions: np.ndarray, values: np.ndarray, count: int) -> None:
        if count > len(self._tensor):
            larger = self._tensor.new_empty((max(count, 2 * len(self._tensor)), self._tensor.shape[1]))
            larger[: len(self._tensor)] = self._tensor
            self._tensor = larger
        values = values.astype(np.float32, copy=False)
        self._tensor[self._torch.from_numpy(positions).cuda()] = self._torch.from_numpy(values).cuda()

    def search(self, queries: np.ndarray, count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        on_device = self._torch.from_numpy(np.ascontiguousarray(queries, np.float32)).cuda()
        scores, positions = faiss.knn_gpu(
            self._resources, on_device, self._tensor[:count], k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return scores.cpu().numpy(), positions.cpu().numpy()
