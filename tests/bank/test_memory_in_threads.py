"""The bank under many threads: whole rows, whole generations. Each row's values say whose they are, and since when."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ask_dist.bank import inverted
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit

KINDS = pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_pq"])


@pytest.fixture(autouse=True)
def threads_that_take_short_turns() -> Iterator[None]:
    """More orders of events, and less waiting: a thread that wants the interpreter gets it soon."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_all(targets: list[Callable[[], None]]) -> list[Exception]:
    """Run functions at once, each in a thread of its own, and return what they raised."""
    errors: list[Exception] = []

    def caught(target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def directions(ids: np.ndarray, generation: int) -> np.ndarray:
    angles = 2.4 * ids + 0.7 * generation
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def swaps(kind: str, generations: int, rows: int) -> tuple[KnowledgeBank, int]:
    """Write every row anew in each generation while 16 threads search, each of whose answers must be of one.

    Returns:
        The bank, and how often index files were swapped.
    """
    bank = KnowledgeBank(2, rows, "float32", index=kind, inverted_from=rows, recall=0.5)
    ids = np.arange(rows)
    bank.upsert(ids, directions(ids, 0), -directions(ids, 0), None, step=0)
    bank.maintain()
    done, swapped = threading.Event(), 0

    def commit() -> None:
        nonlocal swapped
        try:
            for generation in range(1, generations + 1):
                values = directions(ids, generation)
                versions = np.full(rows, generation)
                assert bank.commit(Commit(ids, values, -values, versions, frame=generation)).applied == rows
                swapped += bank.maintain()
        finally:
            done.set()

    def search(first: int) -> None:
        while not done.is_set():
            asked = ids[first : first + 3]
            knowledge = bank.search_ids(asked, 4)
            assert len(knowledge.ids) >= 4
            for found, audio, text in (
                (knowledge.ids, knowledge.audio, knowledge.text),
                (asked, knowledge.own_audio, knowledge.own_text),
            ):
                expected = directions(found, knowledge.generation)
                np.testing.assert_allclose(audio, expected, atol=2e-3)
                np.testing.assert_allclose(text, -expected, atol=2e-3)

    assert run_all([commit, *(lambda first=first: search(first) for first in range(16))]) == []
    assert bank.metrics()["bank/generation"] == generations
    return bank, swapped


def test_no_answer_mixes_two_of_a_thousand_generations():
    bank, _ = swaps("flat", generations=1000, rows=64)
    assert bank.metrics()["bank/searches"] > 100


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
def test_no_answer_mixes_generations_while_rows_move_and_files_are_swapped(kind):
    bank, swapped = swaps(kind, generations=50, rows=300)
    assert bank.metrics()["bank/inverted_rows"] == 300
    assert swapped == (0 if kind == "ivf_flat" else 50)  # the one moves its rows, the other can't


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
def test_no_answer_mixes_generations_while_files_are_overwritten_or_swapped_a_thousand_times(kind, monkeypatch):
    monkeypatch.setattr(inverted, "MOVED_AT_ONCE", 0)
    bank, swapped = swaps(kind, generations=1000, rows=300)
    assert (swapped, bank.metrics()["bank/inverted_rows"]) == (0 if kind == "ivf_flat" else 1000, 300)
    assert bank.metrics()["bank/searches"] > 1000


@KINDS
@pytest.mark.parametrize("wanted", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_no_row_that_four_callers_find_is_torn(kind, wanted):
    rows = 500
    bank = KnowledgeBank(4, rows, "float32", index=kind, inverted_from=rows)
    ids, done = np.arange(rows), threading.Event()
    read = [0, 0, 0, 0]

    def coded(ids: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.stack([ids, steps, ids, steps], axis=1).astype(np.float32)

    def write() -> None:
        rng, step = np.random.default_rng(1), 0
        while not done.is_set():
            step = min(step + 1, 2047)  # the last whole number in a row that float16 holds
            chosen = rng.choice(ids, 100, replace=False)
            values = coded(chosen, np.full(100, step))
            bank.upsert(chosen, values, -values, None, step)
            if step % 50 == 0:
                bank.maintain()

    def search(caller: int) -> None:
        rng = np.random.default_rng(caller)
        while sum(read) < wanted:
            knowledge = bank.search_ids(rng.choice(ids, 50, replace=False), 50)
            expected = coded(knowledge.ids, knowledge.newest_step - knowledge.age)
            assert (knowledge.audio == expected).all()
            assert (knowledge.text == -expected).all()
            read[caller] += len(knowledge.ids)

    def copy() -> None:
        while sum(read) < wanted:
            seen = bank.snapshot()
            expected = coded(seen.ids, seen.step)
            assert (seen.audio == expected).all()
            assert (seen.text == -expected).all()
            time.sleep(0.01)

    def check_all() -> None:
        try:
            assert run_all([copy, *(lambda caller=caller: search(caller) for caller in range(4))]) == []
        finally:
            done.set()

    bank.upsert(ids, coded(ids, 0 * ids), -coded(ids, 0 * ids), None, step=0)
    assert run_all([write, check_all]) == []
    assert sum(read) >= wanted
    assert bank.metrics()["bank/upserts"] > rows
