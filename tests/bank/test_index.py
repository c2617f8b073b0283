"""Exact search against sorting every score, and k-means on well-separated groups."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from ask_dist.bank.index import ExactIndex, InvertedIndex, exact_search, inverted_file, spherical_kmeans


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


def clustered(rng, count: int, dim: int = 32) -> np.ndarray:
    centres = rng.normal(size=(100, dim))
    rows = centres[rng.integers(100, size=count)] + 0.5 * rng.normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_an_inverted_file_follows_its_writes(rng):
    rows = clustered(rng, 6000)
    index = InvertedIndex(32, probes=8)
    index.write(np.arange(4000), rows[:4000])
    same_as_brute_force(index, rows[:4000], rows[:5], k=4)  # exact before it is trained
    inverted = inverted_file(index.copied(), seed=0)
    rows[:500] = clustered(rng, 500)  # written while it was built
    index.write(np.arange(500), rows[:500])
    index.write(np.arange(4000, 5000), rows[4000:5000])
    index.take(inverted, rows[:16], 16, aim=0.9)
    rows[500:900] = clustered(rng, 400)  # and after
    index.write(np.arange(500, 900), rows[500:900])
    index.write(np.arange(5000, 6000), rows[5000:])
    np.testing.assert_array_equal(index.rows, rows)
    assert index.trained_rows == 4000
    for part in (slice(0, 500), slice(500, 900), slice(900, 4000), slice(4000, 6000)):
        np.testing.assert_array_equal(index.search(rows[part], 1)[1][:, 0], np.arange(6000)[part])
    queries = rows[::20]
    found, right = index.search(queries, 16)[1], brute_force(queries, rows, 16)[1]
    shares = [len(set(a) & set(b)) / 16 for a, b in zip(found, right, strict=True)]
    assert index.recall(queries, 16) == pytest.approx(np.mean(shares))
    assert np.mean(shares) > 0.9


def test_looking_into_every_list_is_exact(rng):
    rows = clustered(rng, 2000)
    index = InvertedIndex(32, probes=2000)
    index.write(np.arange(2000), rows)
    assert index.take(inverted_file(index.copied(), seed=0), rows[:16], 16, aim=1.0) == 1.0
    same_as_brute_force(index, rows, rng.normal(size=(20, 32)).astype(np.float32), k=10)


@pytest.mark.parametrize("aim", [0.5, 0.9, 1.0])
def test_probes_grow_until_the_aim_is_reached(rng, aim):
    rows = rng.normal(size=(3000, 32)).astype(np.float32)  # nothing to cluster: one list finds next to nothing
    index = InvertedIndex(32, probes=1)
    index.write(np.arange(3000), rows)
    assert index.take(inverted_file(index.copied(), seed=0), rows[:100], 16, aim=0.0) < 0.5
    assert index.take(inverted_file(index.copied(), seed=0), rows[:100], 16, aim) >= aim


def test_a_list_that_is_too_short_is_made_up_for(rng):
    rows = clustered(rng, 300)
    index = InvertedIndex(32, probes=1)
    index.write(np.arange(300), rows)
    index.take(inverted_file(index.copied(), seed=0), rows[:1], 1, aim=0.0)
    same_as_brute_force(index, rows, rows[:20], k=250)


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
