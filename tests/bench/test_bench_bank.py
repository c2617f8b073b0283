from __future__ import annotations

import pytest

from ask_dist.bench.bank import bank_actor_vs_in_process


@pytest.mark.ray
def test_the_benchmark_searches_both_ways_and_compares(local_ray: None) -> None:
    figures = bank_actor_vs_in_process(rows=500, dim=16, queries=8, neighbours=4, searches=3, rounds=2)
    assert figures["ratio"] == pytest.approx(figures["actor_per_s"] / figures["in_process_per_s"])
    assert figures["by_id_ratio"] == pytest.approx(figures["actor_by_id_per_s"] / figures["in_process_by_id_per_s"])
