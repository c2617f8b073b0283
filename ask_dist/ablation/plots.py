"""PNG plots of an ablation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ask_dist.ablation.analysis import Row
from ask_dist.ablation.probes import ATTRIBUTES

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
}
RECALL = "text_to_audio_R@1"
MEASURES = {"drift": "drift, mean 1 - cos to a fresh row", "overlap": "overlap@10 with fresh rows"}
STORED = tuple(f"{measure}_{modality}" for measure in MEASURES for modality in ("audio", "text"))


def plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name; those whose rows are missing are left out."""
    drawn = {}
    with matplotlib.rc_context({**STYLE, "grid.color": "#dddddd"}):
        for corpus in dict.fromkeys(row.corpus for row in rows):
            clean = [row for row in rows if row.corpus == corpus and row.noise == 0]
            recall = [row for row in clean if row.metric == RECALL]
            for baseline in dict.fromkeys(row.baseline for row in recall):
                compared = [row for row in recall if row.baseline == baseline and row.arm != baseline]
                if compared:
                    drawn[f"{corpus}_against_{baseline}.png"] = _differences(compared, baseline)
                stored = [row for row in clean if row.baseline == baseline and row.metric in STORED]
                if any(row.arm == baseline for row in stored):
                    drawn[f"{corpus}_bank_against_{baseline}.png"] = _stored(stored)
            drawn |= _of_corpus(corpus, rows, clean)
    return drawn


def _of_corpus(corpus: str, rows: Sequence[Row], clean: Sequence[Row]) -> dict[str, bytes]:
    noisy = [row for row in rows if row.corpus == corpus and row.metric == RECALL]
    probed = [row for row in clean if row.metric.startswith("probe_")]
    drawn = {}
    if len({row.noise for row in noisy}) > 1:
        drawn[f"{corpus}_swapped_captions.png"] = _by_noise(noisy)
    if probed:
        drawn[f"{corpus}_probes.png"] = _probes(probed)
    return drawn


def _differences(rows: Sequence[Row], baseline: str) -> bytes:
    """Each arm's difference to the baseline with its interval, the largest on top."""
    ordered = sorted(rows, key=lambda row: row.difference)
    figure, axes = _figure(5.6, 0.9 + 0.28 * len(ordered))
    place, differences = np.arange(len(ordered)), np.array([row.difference for row in ordered])
    errors = np.array([[row.difference - row.low, row.high - row.difference] for row in ordered]).T
    axes.errorbar(differences, place, xerr=errors.clip(min=0), fmt="o", markersize=4, capsize=2)
    axes.set_yticks(place, [f"{row.arm}  {row.mean:.1f}" for row in ordered])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel(f"text to audio R@1, difference to {baseline} ({rows[0].baseline_mean:.1f}), 95% interval")
    return _png(figure)


def _stored(rows: Sequence[Row]) -> bytes:
    """How far the bank's rows are from fresh ones at the end, by arm: drift, and overlap of the nearest."""
    arms = list(dict.fromkeys(row.arm for row in rows))[::-1]
    figure, panels = _figure(7.2, 1.0 + 0.32 * len(arms), columns=2)
    for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for number, modality in enumerate(("audio", "text")):
            means = {row.arm: row.mean for row in rows if row.metric == f"{measure}_{modality}"}
            place = np.arange(len(arms)) + (0.5 - number) * 0.38
            axes.barh(place, [means.get(arm, np.nan) for arm in arms], 0.36, label=modality)
        axes.set_yticks(np.arange(len(arms)), arms if measure == "drift" else [])
        axes.set_xlabel(label)
    panels[0].legend(frameon=False)
    return _png(figure)


def _by_noise(rows: Sequence[Row]) -> bytes:
    """R@1 of the arms that were trained at several shares of swapped captions."""
    figure, axes = _figure(4.8, 3.2)
    for arm in dict.fromkeys(row.arm for row in rows):
        points = {row.noise: row.mean for row in rows if row.arm == arm}
        if len(points) > 1:
            x = sorted(points)
            axes.plot([100 * noise for noise in x], [points[noise] for noise in x], "o-", markersize=4, label=arm)
    axes.set_xlabel("swapped captions, %")
    axes.set_ylabel("text to audio R@1, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(figure)


def _probes(rows: Sequence[Row]) -> bytes:
    """Accuracy of the baseline and of the arm `ask` on each attribute."""
    shown = [arm for arm in dict.fromkeys(row.arm for row in rows) if arm in ("ask", rows[0].baseline)]
    figure, axes = _figure(4.8, 3.0)
    for number, arm in enumerate(shown):
        means = {row.metric: row.mean for row in rows if row.arm == arm}
        heights = [means.get(f"probe_{attribute}", np.nan) for attribute in ATTRIBUTES]
        place = np.arange(len(ATTRIBUTES)) + (number - (len(shown) - 1) / 2) * 0.38
        axes.bar_label(axes.bar(place, heights, 0.36, label=arm), fmt="%.1f", fontsize=7)
    axes.set_xticks(np.arange(len(ATTRIBUTES)), ATTRIBUTES)
    axes.set_ylabel("right caption preferred, %")
    axes.set_ylim(50, 105)
    axes.legend(frameon=False, ncols=2)
    return _png(figure)


def _figure(width: float, height: float, columns: int = 1):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()
