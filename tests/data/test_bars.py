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
    assert log.getvalue() == "train: 700 of 2,000 (35%)\ntrain: 1,500 of 2,000 (75%)\n"


def test_on_a_terminal_there_is_a_bar_instead() -> None:
    log = io.StringIO()
    with bars.bars(Console(file=log, width=120, force_terminal=True)) as update:
        update("train", 500, 2000)
    assert "500/2000" in log.getvalue()
    assert " of 2,000" not in log.getvalue()
