from __future__ import annotations

import pytest

from ask_dist.bench.pack import pack_vs_bare_loop


@pytest.mark.multiprocess
def test_the_benchmark_packs_with_both_and_compares():
    figures = pack_vs_bare_loop(clips=12, seconds=0.1, rounds=1)
    assert min(figures.values()) > 0
    assert figures["ratio"] == pytest.approx(figures["pack"] / figures["bare_loop"])
