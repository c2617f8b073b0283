"""A split's lengths, levels, captions and rates as one picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ask_dist.data.inspect.stats import Measured
from ask_dist.files import write_atomically

BINS = 40


def plot(measured: Measured, title: str, path: Path) -> None:
    """Write the picture as a PNG."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    lengths, levels, words, rates = figure.subplots(2, 2).flat
    _histogram(lengths, measured.seconds, "length in seconds", "clips")
    _histogram(levels, measured.loudness, "level in dBFS (RMS)", "clips")
    _histogram(words, measured.words, "words a caption", "captions")
    names = [f"{rate:,}" for rate in sorted(measured.rates)]
    rates.barh(names, [measured.rates[rate] for rate in sorted(measured.rates)], height=0.4)
    rates.margins(y=0.5 / len(names))
    _label(rates, "clips", "sample rate in Hz")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write_atomically(path, file.getvalue())


def _histogram(axes: Axes, values: np.ndarray, x_label: str, y_label: str) -> None:
    axes.hist(values, bins=BINS)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _label(axes, x_label, y_label)


def _label(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
