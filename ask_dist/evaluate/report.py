"""What a run found: report.json for programs, a self-contained report.html for people, a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ask_dist.data.shards import write_text
from ask_dist.evaluate.charts import Line, bar_chart, histogram, line_chart
from ask_dist.evaluate.long_tail import GROUPS, LongTail

PERCENTAGES = ("R@1", "R@5", "R@10", "mAP@10")
DIRECTIONS = {"text_to_audio": "text → audio", "audio_to_text": "audio → text"}
Facts = Mapping[str, object]


class Histogram(TypedDict):
    """Reliability of the pairs: b + 1 `edges`, and b counts. `swapped` is None where nobody knows which are swapped."""

    edges: Sequence[float]
    clean: Sequence[int]
    swapped: Sequence[int] | None


class Reliability(TypedDict):
    """How pairs were trusted; `auroc` of right against swapped pairs is None where nobody knows."""

    histogram: Histogram
    auroc: float | None


class BadClip(TypedDict):
    """A sample that was skipped, and why."""

    name: str
    reason: str


class Quarantine(TypedDict):
    """Skipped samples: how many, how many of them because they are held out for testing, and the first few."""

    count: int
    leaks: int
    examples: Sequence[BadClip]


class _Optional(TypedDict, total=False):
    dataset: str
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    long_tail: LongTail | None
    drift: Facts | None
    bank: Facts | None
    refine: Facts | None
    throughput: Facts | None
    diagnostics: Facts | None
    reliability: Reliability | None
    quarantine: Quarantine | None
    config: Facts | None
    versions: Facts | None
    machine: Facts | None
    command: str | None
    seconds: float | None


class Results(_Optional):
    """What a run hands over. A part that is absent is null in report.json and left out of report.html.

    Attributes:
        text_to_audio, audio_to_text: `retrieval.QueryRanks.metrics()` of each direction.
        dataset: what they were measured on, for the headline, such as "test".
        intervals: 95% intervals by direction and metric, such as {"text_to_audio": {"R@1": (48.1, 52.0)}}.
        long_tail: of `long_tail.long_tail_metrics`.
        drift, bank, refine, throughput, diagnostics: named numbers, shown as they come (names in EXPLAINED get words).
        config, versions, machine: named values; they may nest.
        seconds: of the whole run.
    """

    text_to_audio: Mapping[str, float]
    audio_to_text: Mapping[str, float]


Series = dict[str, dict[int, float]]

EXPLAINED = {
    "out_of_batch_gradient_share": "share of the embedding gradient outside the batch's span (GLB)",
    "late_share": "share of knowledge answers that came late or failed",
    "failures": "generations of the refiner that failed",
    "given_up": "1 if the refiner ended after too many failures in a row",
    "gradient_norm_ratio": "audio to text gradient norm",
    "samples_per_second": "pairs trained a second",
    "audio_hours_per_second": "hours of audio trained a second",
    "memory/rss_gib": "most memory of the process on rank 0, GiB",
    "memory/peak_gib": "most GPU memory that tensors took on rank 0, GiB",
    "staleness": "mean age of the bank's rows, in steps",
    "audio": "drift of audio rows, mean 1 - cos (RDM)",
    "text": "drift of text rows, mean 1 - cos (RDM)",
    "overlap_audio": "neighbour overlap@10 of audio rows",
    "overlap_text": "neighbour overlap@10 of text rows",
}


def write_report(run_dir: Path, results: Results) -> None:
    """Write report.json and report.html into the run's folder, each whole or not at all.

    Curves come from the run's metrics.jsonl, where there is one. A value that is not finite becomes null.
    """
    plain: dict[str, Any] = dict.fromkeys((*DIRECTIONS, *_Optional.__annotations__)) | _plain(results)
    write_text(run_dir / "report.html", _page(run_dir.name, plain, read_series(run_dir / "metrics.jsonl")))
    # Last, because its presence marks a run as finished.
    write_text(run_dir / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")


def print_table(results: Results, console: Console) -> None:
    """Both directions, and the frequency groups where there are classes, as a table on the terminal."""
    table = Table(title=escape(results.get("dataset", "retrieval")), title_justify="left")
    table.add_column("")
    for heading in (*PERCENTAGES, "median rank"):
        table.add_column(heading, justify="right")
    for direction, label in DIRECTIONS.items():
        found = _plain(results)[direction]
        recall = (_percent(found.get(metric)) for metric in PERCENTAGES)
        table.add_row(label, *recall, _number(found.get("median_rank")))
    long_tail = results.get("long_tail")
    for group in GROUPS if long_tail else ():
        part = long_tail[group]  # type: ignore[index]
        label = f"  text → audio, {group} ({part['queries']:,})"
        table.add_row(label, _percent(part["R@1"]), "", _percent(part["R@10"]), "", "")
    console.print(table)


def read_series(path: Path) -> Series:
    """The finite numbers of a metrics.jsonl, by metric name and step.

    A step that a resumed run wrote again counts once, as written last. Lines that are no JSON object with a step, such
    as the last one of a run that was killed, are passed over.
    """
    series: Series = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError):
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, {})[step] = float(value)
    return {name: dict(sorted(values.items())) for name, values in series.items()}


def _page(name: str, plain: dict[str, Any], series: Series) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "percent": _percent, "duration": _duration}
    template = environment.from_string(files("ask_dist.evaluate").joinpath("report.html").read_text(encoding="utf-8"))
    facts = {part: _facts(plain[part]) for part in ("drift", "bank", "refine", "throughput", "diagnostics")}
    return template.render(
        name=name,
        results=plain,
        percentages=PERCENTAGES,
        directions=DIRECTIONS,
        tiles=_tiles(plain),
        facts={part: rows for part, rows in facts.items() if rows},
        origin={part: _facts(plain[part]) for part in ("versions", "machine") if plain[part]},
        config=yaml.safe_dump(plain["config"], sort_keys=False, allow_unicode=True) if plain["config"] else None,
        sections={title: charts for title, charts in _charts(plain, series).items() if charts},
    )


def _tiles(plain: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Headline numbers: label, value, unit."""
    tail = ((plain["long_tail"] or {}).get("tail") or {}).get("R@1")
    speed = (plain["throughput"] or {}).get("samples_per_second")
    outside = (plain["diagnostics"] or {}).get("out_of_batch_gradient_share")
    auroc = (plain["reliability"] or {}).get("auroc")
    tiles = [
        ("text → audio R@1", plain["text_to_audio"].get("R@1"), "%"),
        ("audio → text R@1", plain["audio_to_text"].get("R@1"), "%"),
        ("tail R@1", tail, "%"),
        ("pairs a second", speed, ""),
        ("gradient from outside the batch", None if outside is None else 100 * outside, "%"),
        ("AUROC of the reliability", auroc, ""),
    ]
    return [(label, _number(value), unit) for label, value, unit in tiles if value is not None]


def _charts(plain: dict[str, Any], series: Series) -> dict[str, dict[str, Markup]]:
    """The figures of each section: caption to <svg>. A figure without data is left out."""
    return {
        "Training": _figures(
            ("Training loss", _curve(series, "train/loss", "loss")),
            ("Recall on held-out clips", _recall_curves(series)),
            ("Throughput", _curve(series, "train/samples_per_second", "pairs a second", low=0)),
            ("Logit scale", _curve(series, "train/logit_scale", "logit scale")),
        ),
        "Knowledge bank": _figures(
            ("Rows in the bank", _curve(series, "bank/rows", "rows", low=0)),
            ("Staleness of the rows", _curve(series, "bank/staleness", "steps", low=0)),
            ("Answers that came late or failed", _curve(series, "bank/late_share", "share", low=0)),
        ),
        "Refinement": _figures(
            ("Drift of stored rows, 1 - cos: before and after refinement", _before_after(series, "drift", "1 - cos")),
            ("Overlap of the ten nearest: before and after refinement", _before_after(series, "overlap", "share")),
        ),
        "Long tail": _long_tail_figures(plain["long_tail"]),
        "Reliability": _reliability_figures(plain["reliability"]),
    }


def _figures(*figures: tuple[str, str | None]) -> dict[str, Markup]:
    # Safe: charts.py draws these, and matplotlib escapes the text in them.
    return {caption: Markup(svg) for caption, svg in figures if svg}


def _line(values: dict[int, float], label: str, colour: int = 0, dashed: bool = False) -> Line:
    return Line(label, np.array(list(values), dtype=float), np.array(list(values.values())), colour, dashed)


def _curve(series: Series, metric: str, y_label: str, low: float | None = None) -> str | None:
    return line_chart([_line(series[metric], metric)], "step", y_label, low) if metric in series else None


def _recall_curves(series: Series) -> str | None:
    lines = []
    for metric, values in series.items():
        dataset, _, measure = metric.removeprefix("eval/").partition("/")
        direction = measure.removesuffix("_R@1")
        if metric.startswith("eval/") and measure.endswith("_R@1") and direction in DIRECTIONS:
            lines.append((f"{dataset}, {DIRECTIONS[direction]}", values))
    shown = [_line(values, label, colour) for colour, (label, values) in enumerate(sorted(lines)[:4])]
    return line_chart(shown, "step", "R@1, %", low=0) if shown else None


def _before_after(series: Series, measure: str, y_label: str) -> str | None:
    """Before (dashed) and after refinement, audio and text, over the generations."""
    generation = series.get("refine/generation", {})
    lines = []
    for colour, modality in enumerate(("audio", "text")):
        for moment in ("before", "after"):
            values = series.get(f"refine/{measure}_{moment}_{modality}", {})
            placed = {int(generation[step]): value for step, value in values.items() if step in generation}
            if placed:
                lines.append(_line(placed, f"{modality} {moment}", colour, dashed=moment == "before"))
    return line_chart(lines, "generation", y_label, log=measure == "drift") if lines else None


def _long_tail_figures(long_tail: dict[str, Any] | None) -> dict[str, Markup]:
    if not long_tail:
        return {}
    recall = {metric: [long_tail[group][metric] for group in GROUPS] for metric in ("R@1", "R@10")}
    names = [f"{group} ({long_tail[group]['queries']:,})" for group in GROUPS]
    bins = long_tail["bins"]
    labels = [_span(b["low"], b["high"]) for b in bins]
    fine = {"R@1": [b["R@1"] for b in bins]}
    return _figures(
        ("Recall by frequency group of the query's rarest class (queries)", bar_chart(recall, names, "", "%")),
        (
            "R@1 by training clips of the query's rarest class",
            bar_chart(fine, labels, "training clips", "R@1, %") if bins else None,
        ),
    )


def _reliability_figures(reliability: dict[str, Any] | None) -> dict[str, Markup]:
    if not reliability:
        return {}
    found = reliability["histogram"]
    counts = {"pairs": found["clean"]}
    if found["swapped"] is not None:
        counts = {"right pairs": found["clean"], "swapped pairs": found["swapped"]}
    return _figures(("Reliability of the training pairs", histogram(found["edges"], counts, "reliability")))


def _facts(values: Mapping[str, Any] | None, prefix: str = "") -> list[tuple[str, str, object]]:
    """Nested named values as rows of a full name, words for it ("" where it has none) and a value."""
    rows: list[tuple[str, str, object]] = []
    for name, value in (values or {}).items():
        if isinstance(value, dict):
            rows += _facts(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, EXPLAINED.get(name, ""), value))
    return rows


def _plain(value: Any) -> Any:
    """The same with JSON's types alone: numpy scalars and arrays unpacked, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _number(value: object) -> str:
    if value is None or value == []:
        return "–"  # noqa: RUF001
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _percent(value: float | None) -> str:
    return _number(None) if value is None else f"{value:.1f}"


def _span(low: int, high: int | None) -> str:
    """A bin's counts in few letters: 0, 10-29, 1k-3k, 1000k+."""
    if high is None or high == low:
        return f"{_short(low)}{'+' if high is None else ''}"
    return f"{_short(low)}-{_short(high)}"


def _short(count: int) -> str:
    return str(count) if count < 1000 else f"{(count + 1) // 1000}k"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
