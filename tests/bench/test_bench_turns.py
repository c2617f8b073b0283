"""What is made of a run's turns."""

from __future__ import annotations

import pytest

from ask_dist.bench.turns import ON, compared, pairs


def turn(on: float, seconds: float) -> dict[str, float]:
    return {ON: on, "step_seconds": seconds}


def test_a_turn_without_is_paired_with_the_one_after_it():
    rows = [turn(1, 9.0), turn(0, 1.0), turn(1, 2.0), turn(0, 3.0), turn(1, 4.0), turn(0, 5.0)]
    assert pairs(rows) == [(rows[1], rows[2]), (rows[3], rows[4])]


def test_a_machine_that_becomes_slower_changes_no_ratio():
    found = pairs([turn(on, seconds * (1.0 + 0.2 * on)) for seconds in (1.0, 2.0, 8.0) for on in (0.0, 1.0)])
    figures = compared(found)
    assert figures["ratio"] == figures["first_quartile"] == figures["third_quartile"] == pytest.approx(1.2)
    assert (figures["without_seconds"], figures["with_seconds"], figures["pairs"]) == (2.0, pytest.approx(2.4), 3)
