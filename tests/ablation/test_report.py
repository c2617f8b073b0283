"""The tables of Markdown."""

from __future__ import annotations

from ask_dist.ablation.analysis import Row
from ask_dist.ablation.report import markdown


def row(arm: str, metric: str, mean: float, difference: float = 0.0) -> Row:
    low, high = difference - 1, difference + 1
    return Row("scenes", 0.3, arm, metric, [0, 1], mean, "plain", 40.0, difference, low, high, 10.0, 60.4)


def test_an_arm_a_line_with_its_difference_and_interval():
    nan = float("nan")
    rows = [
        row("plain", "text_to_audio_R@1", 40.0),
        row("ask", "text_to_audio_R@1", 52.25, 12.25),
        row("ask", "drift_audio", 0.0331, nan),
        row("ask", "validation_text_to_audio_R@1", 50.0),
    ]
    assert markdown(rows).splitlines() == [
        "### scenes, 30% of the captions swapped, against plain",
        "",
        "| arm | seeds | seconds | R@1 |",
        "| --- | --- | --- | --- |",
        "| plain | 2 | 60 | 40.0 |",
        "| ask | 2 | 60 | 52.2, +12.2 (+11.2 to +13.2) |",
        "",
        "| arm | seeds | seconds | drift, audio |",
        "| --- | --- | --- | --- |",
        "| ask | 2 | 60 | 0.0331 |",
    ]
