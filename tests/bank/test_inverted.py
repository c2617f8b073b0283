"""Inverted files against exact search: rows written before, while and after a file is built."""

from __future__ import annotations

import threading

import faiss
import numpy as np
import pytest

from ask_dist.bank import inverted
from ask_dist.bank.inverted import CANDIDATES, FRESH_SHARE, MOVED_AT_ONCE, FreshRows, InvertedIndex
from ask_dist.bank.prototypes import unit_rows

KINDS = pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
DTYPES = pytest.mark.parametrize("dtype", ["float16", "float32"])
ALL_LISTS = 10**6


@pytest.fixture
def lock() -> threading.Lock:
    return threading.Lock()


def clustered(rng, count: int, dim: int = 32) -> np.ndarray:
    centres = np.random.default_rng(3).normal(size=(100, dim))
    rows = unit_rows(centres[rng.integers(100, size=count)] + 0.5 * rng.normal(size=(count, dim)))
    return rows.astype(np.float16).astype(np.float32)


def nearest(queries: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    return np.sort(queries.astype(np.float64) @ rows.T.astype(np.float64), axis=1)[:, ::-1][:, :k]


def found_share(index: InvertedIndex, queries: np.ndarray, rows: np.ndarray, k: int) -> float:
    """Share of the k nearest that are found, after the answers were seen to be sorted, distinct and rightly scored."""
    scores, positions = index.search(queries, k)
    assert positions.shape == (len(queries), k)
    assert all(len(set(answer)) == k for answer in positions.tolist())
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, rows[positions]), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    return float((scores >= nearest(queries, rows, k)[:, -1:] - 1e-5).mean())


@KINDS
@DTYPES
def test_rows_are_found_by_their_newest_value(rng, lock, kind, dtype):
    rows = clustered(rng, 6000)
    index = InvertedIndex(32, dtype, kind=kind, probes=8)
    index.write(np.arange(5000), rows[:5000])
    assert found_share(index, rows[:50], rows[:5000], 4) == 1.0  # exact before there is a file
    assert index.is_due()
    assert index.rebuild(lock, seed=0, aim=0.95) >= 0.95
    assert (index.trained_rows, index.is_due()) == (5000, False)
    rows[:300] = clustered(rng, 300)
    index.write(np.arange(300), rows[:300])
    index.write(np.arange(5000, 5200), rows[5000:5200])  # new ones
    rows[200:400] = clustered(rng, 200)  # and some for the second time
    index.write(np.arange(200, 400), rows[200:400])
    np.testing.assert_array_equal(index.rows.copy(), rows[:5200])
    for part in (slice(0, 200), slice(200, 400), slice(400, 5000), slice(5000, 5200)):
        assert (index.search(rows[part], 1)[1][:, 0] == np.arange(6000)[part]).mean() > 0.99
    queries = rows[: 5200 : 5200 // 64][:64]
    assert found_share(index, queries, rows[:5200], 16) == pytest.approx(index.recall(lock))
    assert index.recall(lock) > 0.9


@KINDS
@DTYPES
def test_looking_into_everything_is_exact(rng, lock, kind, dtype):
    rows = clustered(rng, 1000)
    index = InvertedIndex(32, dtype, kind=kind, probes=ALL_LISTS)
    index.write(np.arange(1000), rows)
    assert index.rebuild(lock, seed=0, aim=1.0) == 1.0
    k = 1000 // CANDIDATES
    for first in (0, 100, 50):
        rows[first : first + 60] = clustered(rng, 60)
        index.write(np.arange(first, first + 60), rows[first : first + 60])
        assert index.trained_rows == 1000
        queries = rng.normal(size=(20, 32)).astype(np.float32)
        assert found_share(index, queries, rows, k) == 1.0


@KINDS
@pytest.mark.parametrize("aim", [0.6, 0.9, 0.99])
def test_a_file_is_searched_more_widely_until_the_aim_is_reached(rng, lock, kind, aim):
    index = InvertedIndex(6, kind=kind, probes=1)
    index.write(np.arange(3000), unit_rows(rng.normal(size=(3000, 6))))
    assert index.rebuild(lock, seed=0, aim=0.0) < aim
    reached = index.rebuild(lock, seed=0, aim=aim)
    assert reached >= aim
    assert (index.trained_rows, index.recall(lock)) == (3000, reached)


@KINDS
def test_where_a_file_would_not_pay_search_stays_exact_until_the_rows_are_others(rng, lock, kind):
    rows = unit_rows(rng.normal(size=(3000, 32)))  # nothing to cluster: one list holds next to nothing
    index = InvertedIndex(32, kind=kind, probes=1)
    index.write(np.arange(3000), rows)
    assert index.rebuild(lock, seed=0, aim=0.99) == index.recall(lock) == 1.0
    assert (index.trained_rows, index.is_due()) == (0, False)
    assert found_share(index, rows[:50], rows, 16) == 1.0
    index.write(np.arange(3000), clustered(rng, 3000))
    index.write(np.arange(1), rows[:1])
    assert index.is_due()
    index.rebuild(lock, seed=0, aim=0.99)
    assert index.trained_rows == 3000


def test_a_list_that_is_too_short_is_made_up_for(rng, lock):
    rows = clustered(rng, 300)
    index = InvertedIndex(32, kind="ivf_flat", probes=1)
    index.write(np.arange(300), rows)
    index.rebuild(lock, seed=0, aim=0.0)
    assert index.trained_rows == 300
    assert found_share(index, rows[:20], rows, 250) == 1.0


def test_neighbours_that_were_all_written_since_are_looked_for_further(rng, lock):
    rows = clustered(rng, 2000)
    index = InvertedIndex(32, kind="ivf_pq", probes=ALL_LISTS)
    index.write(np.arange(2000), rows)
    index.rebuild(lock, seed=0, aim=1.0)
    query = rows[:1].copy()
    near = np.argsort(-(rows @ query[0]))[:300]  # the file still answers with these; there are none of them left
    rows[near] = unit_rows(-query + 0.1 * rng.normal(size=(300, 32)))
    index.write(near, rows[near])
    assert index.trained_rows == 2000
    assert found_share(index, query, rows, 40) > 0.9


@KINDS
def test_where_too_much_was_written_search_is_exact_until_the_next_file(rng, lock, kind):
    count, dim = 4000, 32
    rows = clustered(rng, count, dim)
    index = InvertedIndex(dim, kind=kind, probes=1)
    index.write(np.arange(count), rows)
    index.rebuild(lock, seed=0, aim=0.0)
    many = int(FRESH_SHARE * count)
    assert many * 126 * dim < MOVED_AT_ONCE  # few enough for ivf_flat to move them at once
    index.write(np.arange(many), rows[:many])
    assert index.trained_rows == count
    assert index.is_due() == (kind == "ivf_pq")
    index.write(np.arange(many + 1), rows[: many + 1])
    assert index.trained_rows == (0 if kind == "ivf_pq" else count)
    if kind == "ivf_pq":
        assert found_share(index, rows[:50], rows, 16) == 1.0
        index.rebuild(lock, seed=0, aim=0.0)
        assert index.trained_rows == count


@DTYPES
def test_a_commit_of_all_rows_leaves_them_in_their_lists(rng, lock, dtype, monkeypatch):
    monkeypatch.setattr(inverted, "MOVED_AT_ONCE", 10 * 126 * 32)  # ten rows
    rows, turn = clustered(rng, 4010), 0.1 * rng.normal(size=(32, 32)).astype(np.float32)
    index = InvertedIndex(32, dtype, kind="ivf_flat", probes=4)
    index.write(np.arange(4000), rows[:4000])
    reached = index.rebuild(lock, seed=0, aim=0.95)
    for generation in range(5):
        rows = unit_rows(rows + rows @ turn + 0.02 * rng.normal(size=rows.shape)).astype(np.float16).astype(np.float32)
        order = rng.permutation(4000)
        index.write(order, rows[order])
        assert (index.trained_rows, index.is_due()) == (4000, False), generation
        assert found_share(index, rows[:4000:100], rows[:4000], 16) > reached - 0.05
    index.write(np.arange(3900, 4010), rows[3900:])  # some for the second time, and ten new ones
    assert (index.search(rows[3900:], 1)[1][:, 0] == np.arange(3900, 4010)).mean() > 0.9
    index.write(np.arange(4010), clustered(rng, 4010))  # all anew, each somewhere else
    assert index.has_fallen(index.recall(lock), wanted=0.95)
    assert index.rebuild(lock, seed=0, aim=0.95) > 0.9


@KINDS
def test_recall_that_falls_is_told_from_recall_that_was_never_reached(rng, lock, kind):
    index = InvertedIndex(8, kind=kind, probes=1)
    index.write(np.arange(2000), unit_rows(rng.normal(size=(2000, 8))))
    reached = index.rebuild(lock, seed=0, aim=0.0)
    assert reached < 0.9
    assert not index.has_fallen(reached, wanted=0.95)  # another file would do no better
    assert index.has_fallen(reached - 0.1, wanted=0.95)
    assert not index.has_fallen(reached - 0.1, wanted=reached - 0.2)


@KINDS
def test_what_is_written_while_a_file_is_built_is_found(rng, lock, kind):
    rows = clustered(rng, 6000)
    index = InvertedIndex(32, kind=kind, probes=ALL_LISTS)
    index.write(np.arange(5000), rows[:5000])
    built, versions, problems = threading.Event(), np.zeros(6000, int), []

    def write() -> None:
        own, count = np.random.default_rng(11), 5000
        try:
            while not built.is_set() or count < 6000:
                chosen = own.choice(count, 5, replace=False)
                with lock:
                    rows[chosen] = clustered(own, 5)
                    index.write(chosen, rows[chosen])
                    if count < 6000:
                        index.write(np.arange(count, count + 10), rows[count : count + 10])
                        count += 10
                versions[chosen] += 1
        except Exception as error:
            problems.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    index.rebuild(lock, seed=0, aim=1.0)
    built.set()
    writer.join()
    assert problems == []
    assert versions.any()
    np.testing.assert_array_equal(index.rows.copy(), rows)
    assert found_share(index, rows[:: 6000 // 100], rows, 40) > 0.99


def test_a_row_that_is_written_twice_is_held_once(rng):
    fresh, values = FreshRows(4, threads=1), unit_rows(rng.normal(size=(3, 4)))
    fresh.write(np.array([7, 2]), values[:2])
    fresh.write(np.array([2, 70_000]), values[[2, 1]])
    assert (len(fresh), fresh.size_with(np.array([2, 3, 80_000]))) == (3, 5)
    asked = np.array([[-1, 2, 3], [7, 70_000, 90_000]])
    np.testing.assert_array_equal(fresh.holds(asked), [[False, True, False], [True, True, False]])
    np.testing.assert_array_equal(fresh.search(values, 1)[1][:, 0], [7, 70_000, 2])


@pytest.mark.gpu
@KINDS
@DTYPES
def test_files_on_a_gpu_follow_their_writes(rng, lock, kind, dtype):
    if faiss.get_num_gpus() == 0:
        pytest.skip("FAISS sees no GPU")
    rows = clustered(rng, 6000)
    index = InvertedIndex(32, dtype, gpu=True, kind=kind, probes=8)
    index.write(np.arange(6000), rows)
    assert index.rebuild(lock, seed=0, aim=0.95) >= 0.95
    rows[:500] = clustered(rng, 500)
    index.write(np.arange(500), rows[:500])
    assert index.trained_rows == 6000
    assert found_share(index, rows[::100], rows, 16) > 0.9
    assert found_share(index, rows[:5], rows, 3000) == 1.0  # more than a GPU answers: from the host
