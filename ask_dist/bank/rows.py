"""The master copy of one modality: a matrix that grows by chunks, so that growing copies nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike

CHUNK_ROWS = 65_536  # memory of a chunk is taken up only as its rows are written
BLOCK_ROWS = 8_192  # rows to convert to float32 at a time: 16 MiB of them at width 512


class Rows:
    """Rows [n, dim] of one dtype, in chunks of `CHUNK_ROWS`.

    What was written stays where it is. So a reader needs no lock against a writer if it can do with rows of which half
    is older than the other half.
    """

    def __init__(self, dim: int, dtype: DTypeLike) -> None:
        self.dim, self.dtype = dim, np.dtype(dtype)
        self._chunks: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def write(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Set rows [n] to values [n, dim]; positions past the end extend the matrix, without gaps."""
        if len(positions) == 0:
            return
        end = max(self._count, int(positions.max()) + 1)
        while len(self._chunks) * CHUNK_ROWS < end:
            self._chunks.append(np.empty((CHUNK_ROWS, self.dim), self.dtype))
        for chunk, within, chosen in self._parts(positions):
            chunk[within] = values[chosen]
        self._count = end  # only now: a reader without the lock meets no row that was never written

    def adopt(self, values: np.ndarray) -> None:
        """Begin with values [n, dim]: without a copy where they are writable and of this dtype, and then they are not
        to be used by anyone else."""
        whole = 0
        if values.dtype == self.dtype and values.flags.c_contiguous and values.flags.writeable:
            whole = len(values) // CHUNK_ROWS * CHUNK_ROWS
        self._chunks = [values[first : first + CHUNK_ROWS] for first in range(0, whole, CHUNK_ROWS)]
        self._count = whole
        self.write(np.arange(whole, len(values)), values[whole:])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """A copy of the rows at positions [n], as they are stored."""
        taken = np.empty((len(positions), self.dim), self.dtype)
        for chunk, within, chosen in self._parts(positions):
            taken[chosen] = chunk[within]
        return taken

    def copy(self, dtype: DTypeLike | None = None) -> np.ndarray:
        """All rows as one array, as they are stored or in another dtype."""
        whole = np.empty((self._count, self.dim), dtype or self.dtype)
        for first, block in self.blocks():
            whole[first : first + len(block)] = block
        return whole

    def blocks(self, size: int = CHUNK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """Views of at most `size` rows each, in order, with the position of their first row."""
        count = self._count
        for start, chunk in zip(range(0, count, CHUNK_ROWS), self._chunks, strict=False):
            held = min(CHUNK_ROWS, count - start)
            for first in range(0, held, size):
                yield start + first, chunk[first : min(first + size, held)]

    def float_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """As `blocks`, in float32: whole chunks as they are, or `BLOCK_ROWS` converted into memory that is used again
        for the next."""
        if self.dtype == np.float32:
            yield from self.blocks()
            return
        converted = np.empty((min(BLOCK_ROWS, self._count), self.dim), np.float32)
        for first, block in self.blocks(BLOCK_ROWS):
            converted[: len(block)] = block
            yield first, converted[: len(block)]

    def _parts(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, slice | np.ndarray, slice | np.ndarray]]:
        """Each chunk that positions fall into, the positions within it, and which of them these are."""
        if len(self._chunks) == 1:
            yield self._chunks[0], _run(positions), slice(None)
            return
        numbers = positions // CHUNK_ROWS
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            yield self._chunks[number], _run(positions[chosen] - number * CHUNK_ROWS), _run(chosen)


def _run(positions: np.ndarray) -> slice | np.ndarray:
    """The same positions as a slice, which copies rows at once and not one by one, where they follow one another."""
    if len(positions) and (np.diff(positions) == 1).all():
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions


def any_value(rows: np.ndarray) -> np.ndarray:
    """Which rows [n, dim] are not all zeros: bool [n]. The first value tells of nearly all of them."""
    found = rows[:, 0] != 0
    found[~found] = rows[~found].any(axis=1)
    return found


def grown(array: np.ndarray, needed: int) -> np.ndarray:
    """The array itself, or a copy at least twice as long if it has fewer than `needed` rows."""
    if needed <= len(array):
        return array
    larger = np.zeros((max(needed, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
