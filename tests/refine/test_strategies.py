"""Every strategy on a drift that a linear map follows in part."""

from __future__ import annotations

import numpy as np
import pytest

from ask_dist.bank.prototypes import unit_rows
from ask_dist.evaluate.drift import mean_drift, neighbour_overlap
from ask_dist.refine.gnn import Gnn
from ask_dist.refine.refiner import STRATEGIES
from ask_dist.refine.strategies import RIDGE, Kernel, Mlp, Settings, Task, linear_map

KNOWN, WANTED = 600, 400


@pytest.fixture
def problem(rows, drift) -> tuple[Task, np.ndarray, np.ndarray]:
    """Known rows, wanted ones, and where these have gone."""
    known, wanted = rows(KNOWN), rows(WANTED)
    return Task(known, drift(known)), wanted, drift(wanted)


def test_each_strategy_corrects_rows_it_never_saw(problem):
    task, wanted, truth = problem
    moved = {name: kind(Settings(steps=200)).fit(task)(wanted) for name, kind in STRATEGIES.items()}
    drift = {name: mean_drift(values, truth) for name, values in moved.items()}
    overlap = {name: neighbour_overlap(values, truth) for name, values in moved.items()}
    np.testing.assert_array_equal(moved["none"], wanted)
    assert max(drift["gnn"], drift["mlp"]) < drift["linear"] < 0.5 * drift["none"]
    assert max(drift["knn_mean"], drift["kernel"]) < drift["linear"]
    assert min(overlap["gnn"], overlap["mlp"]) > overlap["linear"]
    assert overlap["gnn"] > overlap["none"]
    for name in ("linear", "knn_mean", "kernel", "mlp", "gnn"):
        np.testing.assert_allclose(np.linalg.norm(moved[name], axis=1), 1, atol=1e-5)


def test_the_linear_map_solves_its_ridge_problem(rows, drift):
    known = rows(100)
    task = Task(known, drift(known))
    move, dim = linear_map(task), known.shape[1]
    shift = move(np.zeros((1, dim), np.float32))
    weight = move(np.eye(dim, dtype=np.float32)) - np.eye(dim) - shift
    error = move(known) - task.fresh
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(known.T @ error + RIDGE * weight, 0, atol=1e-4)


def test_the_kernel_regression_solves_its_ridge_problem(rows, drift):
    known, wanted = rows(80), rows(30)
    task = Task(known, drift(known))
    move = linear_map(task)
    distance = 1.0 - known.astype(np.float64) @ known.T
    kernel = np.exp(-distance / np.median(distance))
    # With every known row as a centre the Nyström form is plain kernel ridge regression.
    weight = np.linalg.solve(kernel + RIDGE * np.eye(len(known)), drift(known) - move(known))
    across = np.exp((wanted.astype(np.float64) @ known.T - 1.0) / np.median(distance))
    expected = unit_rows(move(wanted) + across @ weight)
    np.testing.assert_allclose(Kernel(Settings()).fit(task)(wanted), expected, atol=1e-3)


def test_the_kernel_regression_bears_equal_rows(rows, drift):
    known = np.repeat(rows(40), 30, axis=0)
    moved = Kernel(Settings()).fit(Task(known, drift(known)))(known)
    assert mean_drift(moved, drift(known)) < 0.1 * mean_drift(known, drift(known))


def test_a_common_shift_is_no_matter_of_the_ridge(rows):
    known = rows(10)
    moved = linear_map(Task(known, known + 0.5))(known)
    np.testing.assert_allclose(moved, known + 0.5, atol=1e-5)


@pytest.mark.parametrize("kind", [Mlp, Gnn])
def test_networks_go_on_from_their_state(problem, kind):
    task, wanted, _ = problem
    settings = Settings(steps=80, hidden=32)
    first, second = kind(settings), kind(settings)
    first.fit(task)
    second.load_state(first.state())
    assert first.state().keys() == second.state().keys()
    np.testing.assert_array_equal(first.fit(task)(wanted), second.fit(task)(wanted))
    assert not np.array_equal(kind(settings).fit(task)(wanted), second.fit(task)(wanted))


@pytest.mark.parametrize("name", ["mlp", "gnn"])
def test_going_on_is_better_than_starting_anew(problem, name):
    task, wanted, truth = problem
    strategy = STRATEGIES[name](Settings(steps=100))
    drifts = [mean_drift(strategy.fit(task)(wanted), truth) for _ in range(2)]
    assert drifts[1] < drifts[0]


@pytest.mark.parametrize("name", ["mlp", "gnn"])
def test_early_stopping_leaves_noise_alone(rows, rng, name):
    known, wanted = rows(300), rows(100)
    task = Task(known, known + rng.normal(size=known.shape).astype(np.float32))
    moved = STRATEGIES[name](Settings(steps=200)).fit(task)(wanted)
    overfitted = mean_drift(moved, linear_map(task)(wanted))
    assert overfitted < 0.1  # half the neighbours' mean at most, which is small; a fitted network is far away


def test_no_rows_wanted_is_an_empty_answer(rows, drift):
    known = rows(100)
    for kind in STRATEGIES.values():
        assert kind(Settings(steps=2)).fit(Task(known, drift(known)))(known[:0]).shape == (0, known.shape[1])
