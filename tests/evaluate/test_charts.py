import re
from xml.etree import ElementTree

import numpy as np
import pytest

from ask_dist.evaluate.charts import CSS, Line, bar_chart, histogram, line_chart

STEPS = np.arange(1, 6, dtype=float)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize(
    "svg",
    [
        line_chart([Line("a", STEPS, STEPS), Line("b", STEPS, STEPS**2, 1, dashed=True)], "step", "loss"),
        bar_chart({"R@1": [1.0, None], "R@10": [2.0, 3.0]}, ["head", "tail"], "", "%"),
        histogram([0.0, 0.5, 1.0], {"right": [3, 1], "swapped": [0, 4]}, "reliability"),
    ],
    ids=["line", "bar", "histogram"],
)
def test_a_chart_is_well_formed_and_takes_everything_from_the_page(svg):
    assert svg.startswith("<svg ")
    ElementTree.fromstring(svg)
    assert "http" not in svg
    assert not [stand_in for stand_in in CSS if stand_in in svg]
    assert "var(--c1)" in svg
    assert set(re.findall(r'href="(.)', svg)) <= {"#"}


def test_labels_are_text_and_never_markup_or_mathematics():
    label = "<b>&$x^2$"
    svg = line_chart([Line(label, STEPS, STEPS), Line("other", STEPS, STEPS)], "step", "y")
    assert "<b>" not in svg
    assert label in texts(svg)


def test_a_long_curve_is_averaged_and_keeps_its_mean_level():
    noise = np.random.default_rng(0).normal(size=100_000)
    long = line_chart([Line("noise", np.arange(100_000.0), noise)], "step", "y")
    assert len(long) < 30_000


def test_a_logarithmic_axis_names_plain_numbers_and_gives_way_to_zero():
    drift = np.array([0.001, 0.01, 0.1, 0.5, 1.0])
    assert {"0.01", "0.1"} <= set(texts(line_chart([Line("a", STEPS, drift)], "g", "drift", log=True)))
    assert "0.01" not in texts(line_chart([Line("a", STEPS, drift - 0.001)], "g", "drift", log=True))


def test_equal_input_draws_the_equal_chart():
    first, second = (bar_chart({"R@1": [1.0]}, ["head"], "", "%") for _ in range(2))
    assert first == second
