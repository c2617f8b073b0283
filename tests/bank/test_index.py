"""Exact search against sorting every score, and k-means on well-separated groups."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from ask_dist.bank.index import ExactIndex, exact_search, merged, search_rows, spherical_kmeans
from ask_dist.bank.rows import BLOCK_ROWS, CHUNK_ROWS, Rows


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
        np.testing.assert_array_equal(index.rows.copy(), rows)
        same_as_brute_force(index, rows, rng.normal(size=(6, 8)).astype(np.float32), k=4)


def test_kmeans_finds_separate_directions(rng):
    directions = np.eye(2, 16)
    truth = np.repeat(np.arange(2), 100)
    rows = directions[truth] + 0.05 * rng.normal(size=(200, 16))
    centroids = spherical_kmeans(rows, 2, seed=0)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    members = exact_search(rows, centroids, 1)[1][:, 0]
    assert all(len(set(members[truth == group])) == 1 for group in range(2))
    assert len(set(members)) == 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 7])
@pytest.mark.parametrize(("queries", "k"), [(2, 3), (20, 16)])
def test_search_over_chunks_equals_brute_force(rng, dtype, count, queries, k):
    values = rng.normal(size=(count, 3)).astype(dtype)
    rows = Rows(3, dtype)
    rows.write(np.arange(count), values)
    asked = rng.normal(size=(queries, 3)).astype(np.float32)
    scores, positions = search_rows(asked, rows, k)
    np.testing.assert_allclose(scores, brute_force(asked, values, k)[0], atol=1e-4)
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", asked, values[positions].astype(np.float64)), atol=1e-4)
    assert all(len(set(answer)) == min(k, count) for answer in positions.tolist())


def test_more_neighbours_than_a_block_holds_come_from_all_of_them(rng):
    values = rng.normal(size=(BLOCK_ROWS + 20, 2)).astype(np.float16)
    rows = Rows(2, np.float16)
    rows.write(np.arange(len(values)), values)
    scores, positions = search_rows(values[:3].astype(np.float32), rows, len(values) + 5)
    assert [sorted(answer) for answer in positions.tolist()] == 3 * [list(range(len(values)))]
    np.testing.assert_allclose(scores, brute_force(values[:3], values, len(values))[0], atol=1e-3)


def test_answers_are_merged_best_first():
    answers = [
        (np.array([[0.5, 0.1], [0.9, 0.2]]), np.array([[3, 4], [5, 6]])),
        (np.array([[0.7], [-np.inf]]), np.array([[8], [9]])),
    ]
    scores, positions = merged(answers, queries=2, k=3)
    np.testing.assert_array_equal(positions, [[8, 3, 4], [5, 6, -1]])
    np.testing.assert_allclose(scores[0], [0.7, 0.5, 0.1])


@pytest.mark.gpu
def test_the_gpu_copy_gives_the_same_neighbours(rng):
    if faiss.get_num_gpus() == 0:
        pytest.skip("FAISS sees no GPU")
    index, rows = ExactIndex(32, gpu=True), rng.normal(size=(5000, 32)).astype(np.float32)
    index.write(np.arange(3000), rows[:3000])
    index.write(np.arange(3000, 5000), rows[3000:])
    rows[::3] = rng.normal(size=rows[::3].shape)
    index.write(np.arange(0, 5000, 3), rows[::3])
    queries = rng.normal(size=(64, 32)).astype(np.float32)
    same_as_brute_force(index, rows, queries, k=16)
    same_as_brute_force(index, rows, queries, k=4096)
