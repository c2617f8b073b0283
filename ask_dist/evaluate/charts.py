"""Small inline SVG charts for the report. They take their colours from the page, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

# Stand-ins that no one would choose, turned into CSS variables of the page once the figure is drawn.
INK, GRID = "#0a0b01", "#0a0b02"
SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14")
CSS = {INK: "var(--soft)", GRID: "var(--line)"} | {colour: f"var(--c{i})" for i, colour in enumerate(SERIES, start=1)}
INCHES = (4.6, 2.7)  # about a phone's width at 72 points an inch, so that text keeps its size there
MOST_POINTS = 300
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ask_dist",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


@dataclass(frozen=True)
class Line:
    """One curve: its label, its points, the index of its colour, and whether it is dashed."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    dashed: bool = False


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, low: float | None = None, log: bool = False) -> str:
    """Curves over one axis, as an <svg> element. Long curves are averaged to a few hundred points.

    Args:
        low: least value that the y axis shows; None lets the data decide.
        log: whether the y axis is logarithmic, where every value is above zero.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label)
        for line in lines:
            x, y = _thin(line.x), _thin(line.y)
            style, marker = ("--" if line.dashed else "-"), ("o" if len(x) <= 12 else None)
            axes.plot(
                x, y, style, marker=marker, markersize=3, linewidth=1.6, color=SERIES[line.colour], label=line.label
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if log and all((line.y > 0).all() for line in lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=low)
        return _svg(figure, axes, labels=len(lines))


def bar_chart(bars: Mapping[str, Sequence[float | None]], names: Sequence[str], x_label: str, y_label: str) -> str:
    """Groups of upright bars from zero, as an <svg> element.

    Args:
        bars: for each label of the legend one height a group; None draws no bar.
        names: of the groups, along the x axis.
    """
    width = 0.8 / len(bars)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label)
        for i, (label, heights) in enumerate(bars.items()):
            place = np.arange(len(names)) + (i - (len(bars) - 1) / 2) * width
            drawn = axes.bar(place, [height or 0.0 for height in heights], width * 0.92, color=SERIES[i], label=label)
            if len(names) <= 3:
                text = ["" if height is None else f"{height:.1f}" for height in heights]
                axes.bar_label(drawn, text, fontsize=8, padding=1)
        axes.set_xticks(np.arange(len(names)), names, rotation=35 if len(names) > 5 else 0)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        return _svg(figure, axes, labels=len(bars))


def histogram(edges: Sequence[float], counts: Mapping[str, Sequence[int]], x_label: str) -> str:
    """Ready-made histograms over common edges, each as percent of its own total, as an <svg> element."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, "% of the pairs")
        for i, (label, values) in enumerate(counts.items()):
            share = 100 * np.asarray(values, dtype=float) / max(sum(values), 1)
            axes.stairs(share, edges, fill=True, alpha=0.3, color=SERIES[i])
            axes.stairs(share, edges, linewidth=1.4, color=SERIES[i], label=f"{label} ({sum(values):,})")
        axes.set_ylim(bottom=0)
        return _svg(figure, axes, labels=len(counts))


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of equal runs of values, at most MOST_POINTS of them."""
    run = -(-len(values) // MOST_POINTS)
    return np.array([values[start : start + run].mean() for start in range(0, len(values), run)])


def _svg(figure: Figure, axes: Axes, labels: int) -> str:
    """The figure as an element that stands inside HTML: no prologue, no metadata, no address, colours from the page."""
    if labels > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3 if labels == 3 else 2)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = re.sub(r' id="(figure|axes|matplotlib\.axis|patch|line2d|text|xtick|ytick|legend)_\d+"', "", svg)
    for stand_in, variable in CSS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("xlink:href", "href")
