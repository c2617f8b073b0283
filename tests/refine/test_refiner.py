"""The refiner against a real bank whose workers re-encode some of the rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import EXTERNAL
from ask_dist.errors import InputError
from ask_dist.evaluate.drift import mean_drift
from ask_dist.refine.refiner import STRATEGIES, Refiner, corrected_rows, generation
from ask_dist.refine.strategies import Settings

ROWS = 900
QUICK = Settings(steps=40, hidden=32)


class Run:
    """A bank of `ROWS` pairs, and encoders that move a little with every call of `reencode`."""

    def __init__(self, rows: Callable, drift: Callable, rng: np.random.Generator) -> None:
        self.audio, self.text, self.ids = rows(ROWS), rows(ROWS), np.arange(ROWS)
        self.first = self.audio  # what a bank without a refiner would hold of rows that nobody re-encodes
        self.drift, self.rng, self.step = drift, rng, 0
        self.bank = KnowledgeBank(self.audio.shape[1], ROWS)
        self.bank.upsert(self.ids, self.audio, self.text, None, 0)

    def reencode(self, count: int, within: int = ROWS, amount: float = 0.2) -> np.ndarray:
        self.step += 10
        self.audio, self.text = self.drift(self.audio, amount), self.drift(self.text, amount)
        chosen = self.rng.choice(within, count, replace=False)
        self.bank.upsert(chosen, self.audio[chosen], self.text[chosen], None, self.step)
        return chosen

    def drift_of(self, rows: np.ndarray) -> float:
        now = self.bank.snapshot()
        return mean_drift(
            np.concatenate([now.audio, now.text], 1)[rows], np.concatenate([self.audio, self.text], 1)[rows]
        )


@pytest.fixture
def run(rows, drift, rng) -> Run:
    return Run(rows, drift, rng)


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"none"}))
def test_rows_that_nobody_reencoded_follow(run, strategy):
    refiner = Refiner(strategy, settings=QUICK)
    assert refiner.refine(run.bank.snapshot()) == (None, None)
    fresh = run.reencode(400)
    others = np.setdiff1d(run.ids, fresh)
    before, snapshot = run.drift_of(others), run.bank.snapshot()
    commit, report = refiner.refine(snapshot)
    result = run.bank.commit(commit)
    assert (result.applied, result.skipped) == (500, 0)
    assert run.drift_of(others) < 0.6 * before
    assert run.drift_of(fresh) < 1e-5
    np.testing.assert_array_equal(commit.ids, others)
    assert commit.frame == 10
    assert (report.generation, report.fresh, report.stale) == (1, 400, 500)
    assert report.drift_before_audio == pytest.approx(before, rel=0.3)
    assert report.drift_after_audio < 0.6 * report.drift_before_audio
    assert report.overlap_after_text > report.overlap_before_text


def test_generations_chain(run):
    refiner = Refiner("gnn", settings=QUICK)
    refiner.refine(run.bank.snapshot())
    untouched = run.ids[600:]
    for number in range(1, 6):
        run.reencode(300, within=600)
        commit, report = refiner.refine(run.bank.snapshot())
        assert run.bank.commit(commit).generation == report.generation == number
    assert run.drift_of(untouched) < 0.3 * mean_drift(run.first[untouched], run.audio[untouched])
    assert run.bank.metrics()["bank/staleness"] == 0


def test_a_fixed_anchor_corrects_only_rows_that_were_never_reencoded(run):
    refiner = Refiner("linear", anchor="first", settings=QUICK)
    refiner.refine(run.bank.snapshot())
    corpus, reencoded = run.ids[600:], set()
    for _ in range(4):
        reencoded |= set(run.reencode(300, within=600).tolist())
        commit, _ = refiner.refine(run.bank.snapshot())
        run.bank.commit(commit)
        assert set(commit.ids.tolist()) == set(run.ids.tolist()) - reencoded
    assert run.drift_of(corpus) < 0.3 * mean_drift(run.first[600:], run.audio[600:])


def test_a_row_reencoded_meanwhile_is_not_overwritten(run):
    refiner = Refiner("linear", settings=QUICK)
    refiner.refine(run.bank.snapshot())
    run.reencode(400)
    commit, _ = refiner.refine(run.bank.snapshot())
    meanwhile = run.reencode(300)
    result = run.bank.commit(commit)
    assert result.skipped == len(np.intersect1d(commit.ids, meanwhile)) > 0
    assert run.drift_of(meanwhile) < 1e-5
    run.reencode(200)
    commit, report = refiner.refine(run.bank.snapshot())
    assert report.applied_audio  # those rows are ordinary fresh rows of the next generation


def test_too_few_fresh_rows_gather(run):
    refiner = Refiner("linear", minimum_fresh=250, settings=QUICK)
    refiner.refine(run.bank.snapshot())
    run.reencode(200)
    assert refiner.refine(run.bank.snapshot()) == (None, None)
    run.reencode(200)
    commit, report = refiner.refine(run.bank.snapshot())
    assert commit is not None
    assert report.fresh > 250


def test_rows_that_come_later_join(run, rows):
    bank = KnowledgeBank(run.audio.shape[1], ROWS)
    refiner = Refiner("linear", settings=QUICK)
    assert refiner.refine(bank.snapshot()) == (None, None)
    for start in range(0, ROWS, 300):
        part = slice(start, start + 300)
        bank.upsert(run.ids[part], run.audio[part], run.text[part], None, start // 300)
        assert refiner.refine(bank.snapshot()) == (None, None)
    run.bank, run.step = bank, 10
    fresh = run.reencode(400)
    commit, _ = refiner.refine(bank.snapshot())
    np.testing.assert_array_equal(commit.ids, np.setdiff1d(run.ids, fresh))


def test_a_correction_that_helps_nobody_is_not_committed(run, rng):
    refiner = Refiner("knn_mean", settings=QUICK)
    refiner.refine(run.bank.snapshot())
    chosen = np.arange(400)
    run.step = 10
    swapped = run.audio[rng.permutation(400)]  # nothing to learn: a strategy that saw the measured rows would shine
    run.bank.upsert(chosen, swapped, run.drift(run.text)[:400], None, 10)
    commit, report = refiner.refine(run.bank.snapshot())
    assert report.drift_after_text < report.drift_before_text
    assert report.applied_text
    if report.applied_audio:  # random pairs shrink towards their mean, which may look like a gain but never like a fit
        assert report.drift_after_audio > 0.3 * report.drift_before_audio
    else:
        np.testing.assert_array_equal(commit.audio, run.bank.snapshot().audio[400:])


def test_the_baseline_measures_and_commits_nothing(run):
    refiner = Refiner("none", settings=QUICK)
    refiner.refine(run.bank.snapshot())
    drifts = []
    for _ in range(2):
        run.reencode(400)
        commit, report = refiner.refine(run.bank.snapshot())
        assert commit is None
        assert not report.applied_audio
        assert report.drift_after_audio == report.drift_before_audio
        drifts.append(report.drift_before_audio)
    assert drifts[1] > drifts[0]  # its source stays the beginning


@pytest.mark.parametrize("strategy", ["linear", "gnn"])
def test_state_round_trip(run, strategy):
    refiner, again = Refiner(strategy, settings=QUICK), Refiner(strategy, settings=QUICK)
    refiner.refine(run.bank.snapshot())
    run.reencode(400)
    run.bank.commit(refiner.refine(run.bank.snapshot())[0])
    again.load_state(refiner.state())
    run.reencode(400)
    expected, resumed = refiner.refine(run.bank.snapshot())[0], again.refine(run.bank.snapshot())[0]
    for name in ("ids", "audio", "text", "versions"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(expected, name))
    fresh_start = Refiner(strategy, settings=QUICK)
    fresh_start.load_state(Refiner(strategy, settings=QUICK).state())
    assert fresh_start.refine(run.bank.snapshot()) == (None, None)


def test_corrected_rows_are_what_the_bank_then_holds(run):
    refiner = Refiner("linear", settings=QUICK)
    refiner.refine(run.bank.snapshot())
    run.reencode(400)
    snapshot = run.bank.snapshot()
    commit, _ = refiner.refine(snapshot)
    run.bank.commit(commit)
    audio, text = corrected_rows(snapshot, [commit], run.ids)
    np.testing.assert_allclose(audio, run.bank.snapshot().audio, atol=1e-3)
    np.testing.assert_allclose(text, run.bank.snapshot().text, atol=1e-3)
    np.testing.assert_array_equal(corrected_rows(snapshot, [], run.ids)[0], snapshot.audio.astype(np.float32))


MEASURED = """
import resource, sys
import numpy as np
from ask_dist.bank.messages import Snapshot
from ask_dist.refine.refiner import Refiner, generation

STRATEGY, ROWS, DIM = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
audio, text = np.empty((2, ROWS, DIM), np.float16)
for half in (audio, text):
    for first in range(0, ROWS, 10_000):
        half[first : first + 10_000] = rng.standard_normal(half[first : first + 10_000].shape, np.float32) / DIM**0.5
ids, zeros = np.arange(ROWS), np.zeros(ROWS, np.int64)

def snapshot(step):
    steps = zeros.copy()
    steps[: ROWS // 10] = step
    moved = [audio.copy(), text.copy()]
    for half in moved:
        half[: ROWS // 10] += np.float16(0.01 * step)
    return Snapshot(ids, *moved, steps, zeros.copy(), zeros, zeros.astype(np.float32), 0, step)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

refiner = Refiner(STRATEGY)
generation([(refiner, None)], snapshot(0), [32], 0)
before = peak()
commits, reports = generation([(refiner, None)], snapshot(1), [32], 0)
assert len(commits[0].ids) == ROWS - ROWS // 10, reports
print(peak() - before, audio.nbytes + text.nbytes)
"""


def memory(strategy: str, rows: int, dim: int) -> tuple[int, int]:
    """Bytes that a second generation adds to the peak of a process, and bytes of the rows in float16."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, strategy, str(rows), str(dim)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    taken, size = map(int, done.stdout.split())
    return taken, size


def test_memory_of_a_generation_follows_the_bank_in_float16():
    """A new snapshot, the next source and the commit, each as large as the rows are in float16; nothing in float32."""
    taken, rows = memory("kernel", 100_000, 256)
    assert taken < 4 * rows + 100 * 2**20  # and the work on a part and on the known rows


@pytest.mark.parametrize(
    ("strategy", "rows"), [("knn_mean", 200_000), pytest.param("gnn", 1_000_000, marks=pytest.mark.slow)]
)
def test_memory_of_a_generation_does_not_follow_the_neighbours_whoever_searches_for_them(strategy, rows):
    taken, size = memory(strategy, rows, 64)
    # Neighbours of all rows at once would take 16 rows of float32 a row, 16 times what both its halves take in float16.
    assert taken < 3 * size + 250 * 2**20 < 16 * size


def test_an_unknown_strategy_is_an_input_error():
    with pytest.raises(InputError, match="choose one of none, linear"):
        Refiner("magic")


def test_external_rows_are_corrected_and_a_missing_half_stays_missing(run, rows):
    """Rows of another corpus, some of them texts alone, beside a run's own; by both refiners of an actor."""
    corpus, alone = run.ids[600:], run.ids[800:]
    run.audio[alone] = 0.0
    state = KnowledgeBank(run.audio.shape[1], ROWS)
    state.upsert(run.ids, run.audio, run.text, None, 0)
    told = state.state()
    told["step"][corpus] = EXTERNAL
    run.bank = KnowledgeBank.from_state(told, dim=run.audio.shape[1], capacity=ROWS)
    text, audio = run.text.copy(), run.audio.copy()
    trained, external = Refiner("linear", settings=QUICK), Refiner("linear", anchor="first", settings=QUICK)
    external.refine(run.bank.snapshot())
    for _ in range(4):
        run.reencode(300, within=600)
        run.audio[alone] = 0.0
        snapshot = run.bank.snapshot()
        parts = [(trained, np.flatnonzero(snapshot.step != EXTERNAL)), (external, None)]
        commits, reports = generation(parts, snapshot, [8], seed=0)
        for commit in commits:
            run.bank.commit(commit)
    assert reports[1].stale >= len(corpus)  # and rows of the run that nobody has re-encoded since
    now = run.bank.snapshot()
    assert set(now.step[corpus].tolist()) == {EXTERNAL}
    assert mean_drift(now.text[corpus], run.text[corpus]) < 0.3 * mean_drift(text[corpus], run.text[corpus])
    heard = np.setdiff1d(corpus, alone)
    assert mean_drift(now.audio[heard], run.audio[heard]) < 0.3 * mean_drift(audio[heard], run.audio[heard])
    np.testing.assert_array_equal(now.audio[alone], 0.0)
    np.testing.assert_allclose(np.linalg.norm(now.audio[heard].astype(np.float32), axis=1), 1.0, atol=1e-2)
    (level,) = commits[-1].prototypes
    np.testing.assert_allclose(np.linalg.norm(level[0].astype(np.float32), axis=1), 1.0, atol=1e-2)
