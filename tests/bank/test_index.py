"""Exact search against sorting every score, and k-means on well-separated groups."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from ask_dist.bank.index import ExactIndex, exact_search, spherical_kmeans


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def same_as_brute_force(index: ExactIndex, rows: np.ndarray, queries: np.ndarray, k: int) -> None:
    scores, positions = index.search(queries, k)
    expected_scores, expected = brute_force(queries, rows, k)
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


@pytest.mark.parametrize(("rows", "queries", "k"), [(50, 3, 5), (3000, 64, 16), (10, 4, 25), (1, 1, 1)])
def test_exact_search_equals_brute_force(rng, rows, queries, k):
    matrix = rng.normal(size=(rows, 24)).astype(np.float32)
    asked = rng.normal(size=(queries, 24)).astype(np.float32)
    scores, positions = exact_search(asked, matrix, k)
    expected_scores, expected = brute_force(asked, matrix, k)
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    assert positions.shape == (queries, min(k, rows))


def test_nothing_to_search_is_an_empty_answer():
    scores, positions = exact_search(np.zeros((3, 4)), np.zeros((0, 4), np.float32), 5)
    assert scores.shape == positions.shape == (3, 0)
    assert exact_search(np.zeros((0, 4)), np.zeros((6, 4), np.float32), 5)[1].shape == (0, 5)


def test_an_index_follows_its_writes(rng):
    index, rows = ExactIndex(8), np.zeros((0, 8), np.float32)
    for extra in (1, 3, 40, 5):
        values = rng.normal(size=(extra, 8)).astype(np.float32)
        index.write(np.arange(len(rows), len(rows) + extra), values)
        rows = np.concatenate([rows, values])
        overwritten = rng.choice(len(rows), size=len(rows) // 2, replace=False)
        rows[overwritten] = rng.normal(size=(len(overwritten), 8))
        index.write(overwritten, rows[overwritten])
        np.testing.assert_array_equal(index.rows, rows)
        same_as_brute_force(index, rows, rng.normal(size=(6, 8)).astype(np.float32), k=4)


def test_kmeans_finds_separate_directions(rng):
    directions = np.eye(2, 16)
    truth = np.repeat(np.arange(2), 100)
    rows = directions[truth] + 0.05 * rng.normal(size=(200, 16))
    members = spherical_kmeans(rows, 2, seed=0)
    assert all(len(set(members[truth == group])) == 1 for group in range(2))
    assert len(set(members)) == 2


@pytest.mark.gpu
def test_the_gpu_copy_gives_the_same_neighbours(rng):
    if faiss.get_num_gpus() == 0:
        pytest.skip("FAISS sees no GPU")
    index, rows = ExactIndex(32), rng.normal(size=(5000, 32)).astype(np.float32)
    index.write(np.arange(3000), rows[:3000])
    index.write(np.arange(3000, 5000), rows[3000:])
    rows[::3] = rng.normal(size=rows[::3].shape)
    index.write(np.arange(0, 5000, 3), rows[::3])
    queries = rng.normal(size=(64, 32)).astype(np.float32)
    same_as_brute_force(index, rows, queries, k=16)
    same_as_brute_force(index, rows, queries, k=4096)
