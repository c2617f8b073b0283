"""Edges against sorting every score."""

from __future__ import annotations

import numpy as np
import pytest

from ask_dist.refine.graph import edges, nearest, nearest_others


def sorted_others(rows: np.ndarray, own: int) -> list[int]:
    scores = rows.astype(np.float64) @ rows[own].astype(np.float64)
    return sorted((row for row in range(len(rows)) if row != own), key=lambda row: -scores[row])


@pytest.mark.parametrize(("count", "k"), [(60, 5), (4, 9), (2, 1)])
def test_nearest_others_leaves_the_row_itself_out(rows, count, k):
    values = rows(count)
    found = nearest_others(values, k)
    assert found.shape == (count, min(k, count - 1))
    for own in range(count):
        assert found[own].tolist() == sorted_others(values, own)[:k]


def test_equal_rows_still_have_k_others(rows):
    values = np.repeat(rows(1), 12, axis=0)
    found = nearest_others(values, 4)
    assert found.shape == (12, 4)
    assert not (found == np.arange(12)[:, None]).any()


def test_nearest_takes_sources_only(rows):
    targets, sources = rows(7), rows(20)
    expected = np.argsort(-(targets @ sources.T), axis=1)[:, :3]
    np.testing.assert_array_equal(nearest(targets, sources, 3), expected)


def test_edges_run_from_neighbour_to_target():
    np.testing.assert_array_equal(edges(np.array([[4, 7], [2, 0]])), [[4, 7, 2, 0], [0, 0, 1, 1]])
