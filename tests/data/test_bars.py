from __future__ import annotations

import io

import pytest
from rich.console import Console

from ask_dist.data import bars


def test_without_a_terminal_a_line_tells_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    now = 100.0
    monkeypatch.setattr(bars.time, "monotonic", lambda: now)
    with bars.bars(Console(file=log, width=80)) as update:
        for done in range(0, 2001, 100):
            now += 4.0
            update("train", done, 2000)
    assert log.getvalue() == (
        "train: 700 of 2,000 (35%), 25/s, 0:00:52 left\ntrain: 1,500 of 2,000 (75%), 25/s, 0:00:20 left\n"
    )


def test_the_rate_counts_from_where_a_stage_began(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    now = 100.0
    monkeypatch.setattr(bars.time, "monotonic", lambda: now)
    with bars.bars(Console(file=log, width=80)) as update:
        update("train", 1000, 90_000)  # an earlier call packed these
        now += 31.0
        update("train", 1000, 90_000)
        now += 31.0
        update("train", 1062, 90_000)
        update("test", 0, 10)
        now += 40.0
        update("test", 10, 10)
    assert log.getvalue() == (
        "train: 1,000 of 90,000 (1%), 0/s\n"
        "train: 1,062 of 90,000 (1%), 1/s, 1 day, 0:42:18 left\n"
        "test: 10 of 10 (100%), 0.25/s, 0:00:00 left\n"
    )


def test_on_a_terminal_there_is_a_bar_instead() -> None:
    log = io.StringIO()
    now = 100.0
    with bars.bars(Console(file=log, width=120, force_terminal=True, get_time=lambda: now)) as update:
        for done in (0, 500, 1000):
            update("train", done, 2000)
            now += 4.0
    assert "1000/2000" in log.getvalue()
    assert "125/s" in log.getvalue()
    assert "0:00:08" in log.getvalue()
    assert " of 2,000" not in log.getvalue()
