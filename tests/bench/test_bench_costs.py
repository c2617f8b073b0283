from __future__ import annotations

import numpy as np
import pytest

from ask_dist.bench.costs import line, looks


def test_a_line_is_found_where_there_is_one() -> None:
    assert line([1, 10, 100], [2.5, 7.0, 52.0]) == pytest.approx({"fixed": 2.0, "growth": 0.5})


def test_small_times_count_as_much_as_large_ones() -> None:
    sizes = np.array([1e3, 1e4, 1e5])
    found = line(sizes, 1e-4 + 1e-8 * sizes * np.array([1.0, 1.0, 1.2]))
    assert found["fixed"] == pytest.approx(1e-4, rel=0.1)


def test_neither_part_is_negative() -> None:
    assert line([1, 2, 3], [0.1, 2.0, 4.5])["fixed"] == 0.0
    assert line([1, 2, 3], [3.0, 2.0, 1.0])["growth"] == 0.0


def test_a_replica_s_look_takes_longer_in_a_larger_bank() -> None:
    found = looks(4, (1_000, 200_000))
    assert min(found.values()) > 0
    assert found["growth"] * 200_000 > found["fixed"]
