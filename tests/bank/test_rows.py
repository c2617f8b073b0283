"""Rows in chunks against one plain matrix, at the borders of chunks above all."""

from __future__ import annotations

import numpy as np
import pytest

from ask_dist.bank.rows import BLOCK_ROWS, CHUNK_ROWS, Rows


def filled(rng, count: int, dtype="float32") -> tuple[Rows, np.ndarray]:
    rows, values = Rows(2, dtype), rng.normal(size=(count, 2)).astype(dtype)
    rows.write(np.arange(count), values)
    return rows, values


@pytest.mark.parametrize("count", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_written_is_read(rng, count, dtype):
    rows, values = filled(rng, count, dtype)
    assert len(rows) == count
    np.testing.assert_array_equal(rows.copy(), values)
    borders = np.array([p for p in (0, CHUNK_ROWS - 1, CHUNK_ROWS, 2 * CHUNK_ROWS, count - 1) if p < count])
    shuffled = np.concatenate([rng.permutation(borders), rng.integers(count, size=20)])
    np.testing.assert_array_equal(rows.take(shuffled), values[shuffled])
    assert rows.take(shuffled).dtype == dtype


def test_writes_across_a_border_go_to_both_sides(rng):
    rows, values = filled(rng, CHUNK_ROWS - 3)
    more = rng.normal(size=(7, 2)).astype(np.float32)
    rows.write(np.arange(CHUNK_ROWS - 3, CHUNK_ROWS + 4), more)
    values = np.concatenate([values, more])
    changed = np.array([CHUNK_ROWS, 5, CHUNK_ROWS - 1, CHUNK_ROWS + 3])
    values[changed] = rng.normal(size=(4, 2))
    rows.write(changed, values[changed])
    np.testing.assert_array_equal(rows.copy(), values)


def test_growing_moves_nothing(rng):
    rows, values = filled(rng, 10)
    ((_, view),) = rows.blocks()
    rows.write(np.arange(10, CHUNK_ROWS + 1), np.zeros((CHUNK_ROWS - 9, 2)))
    assert np.shares_memory(view, next(rows.blocks())[1])
    np.testing.assert_array_equal(view, values)


@pytest.mark.parametrize(("dtype", "size"), [("float16", BLOCK_ROWS), ("float32", CHUNK_ROWS)])
def test_float_blocks_cover_the_rows_once_in_order(rng, dtype, size):
    rows, values = filled(rng, CHUNK_ROWS + 100, dtype)
    found = [(first, block.copy()) for first, block in rows.float_blocks()]
    assert [first for first, _ in found] == list(range(0, CHUNK_ROWS + 100, size))
    assert {block.dtype for _, block in found} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), values.astype(np.float32))


def test_without_rows_there_is_nothing_to_read():
    rows = Rows(3, np.float16)
    rows.write(np.zeros(0, np.int64), np.zeros((0, 3)))
    assert (len(rows), rows.copy().shape, rows.take(np.zeros(0, np.int64)).shape) == (0, (0, 3), (0, 3))
    assert list(rows.blocks()) == list(rows.float_blocks()) == []


@pytest.mark.parametrize("count", [0, 5, CHUNK_ROWS, CHUNK_ROWS + 5])
@pytest.mark.parametrize("writable", [True, False])
def test_adopted_rows_are_as_written_ones_and_whole_chunks_are_not_copied(rng, count, writable):
    values = rng.normal(size=(count, 2)).astype(np.float32)
    values.flags.writeable = writable
    wanted, rows = values.copy(), Rows(2, np.float32)
    rows.adopt(values)
    np.testing.assert_array_equal(rows.copy(), wanted)
    shared = [np.shares_memory(block, values) for _, block in rows.blocks()]
    assert shared == [writable and len(block) == CHUNK_ROWS for _, block in rows.blocks()]
    more = rng.normal(size=(7, 2)).astype(np.float32)
    rows.write(np.arange(count, count + 7), more)
    rows.write(np.array([0]), more[:1])
    wanted = np.concatenate([wanted, more])
    wanted[0] = more[0]
    np.testing.assert_array_equal(rows.copy(), wanted)


def test_rows_of_another_dtype_are_copied(rng):
    values, rows = rng.normal(size=(CHUNK_ROWS, 2)), Rows(2, np.float16)
    rows.adopt(values)
    np.testing.assert_array_equal(rows.copy(), values.astype(np.float16))
