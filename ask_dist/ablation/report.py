"""ablation.json, ablation.html, ablation.md and the table on the terminal."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from ask_dist.ablation.analysis import Row
from ask_dist.ablation.plots import RECALL, plots
from ask_dist.ablation.probes import ATTRIBUTES
from ask_dist.ablation.space import Ablation
from ask_dist.files import write_atomically

# The tables of ablation.md, their metrics and columns.
TABLES = (
    {RECALL: "R@1", "audio_to_text_R@1": "audio to text R@1", "tail_text_to_audio_R@1": "R@1, tail classes"},
    {f"probe_{attribute}": f"probe: {attribute}" for attribute in ATTRIBUTES},
    {
        "auroc": "AUROC",
        **{f"{what}_{of}": f"{what}, {of}" for what in ("drift", "overlap") for of in ("audio", "text")},
        "refine_seconds": "s a generation",
        "encode_seconds": "s to re-encode",
    },
)


def write_report(folder: Path, ablation: Ablation, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Writes ablation.json (a list of rows), ablation.md, machine.json, plots and ablation.html, which holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "ablation.json", json.dumps([_plain(row) for row in rows], indent=1).encode())
    write_atomically(folder / "machine.json", json.dumps(machine, indent=1).encode())
    write_atomically(folder / "ablation.md", markdown(rows).encode())
    drawn = plots(rows)
    for name, content in drawn.items():
        write_atomically(folder / name, content)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ask_dist.ablation", "."), autoescape=True)
    environment.filters |= {"number": _number, "metric": lambda name: name.replace("_", " ")}
    page = environment.get_template("ablation.html").render(
        name=ablation.name,
        sections=_sections(rows),
        images={name: base64.b64encode(content).decode() for name, content in drawn.items()},
        machine=machine,
        settings=json.dumps(ablation.model_dump(mode="json"), indent=1),
    )
    write_atomically(folder / "ablation.html", page.encode())


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Text-to-audio R@1 of each arm, with the interval of its difference to the baseline."""
    for title, metrics in _sections(rows).items():
        table = Table("arm", "seeds", "R@1", "difference", "95% interval", "seconds", title=title, title_justify="left")
        for row in metrics.get(RECALL, []):
            told = (
                ("", "")
                if row.arm == row.baseline
                else (f"{row.difference:+.1f}", f"{row.low:+.1f} to {row.high:+.1f}")
            )
            table.add_row(row.arm, str(len(row.seeds)), f"{row.mean:.1f}", *told, f"{row.seconds:.0f}")
        console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """Tables of Markdown, an arm a line: of metrics in percent the mean and the difference to the baseline."""
    parts = []
    for title, metrics in _sections(rows).items():
        parts.append(f"### {title}")
        for names in TABLES:
            columns = {name: label for name, label in names.items() if name in metrics}
            cells = {name: {row.arm: _cell(row) for row in metrics[name]} for name in columns}
            lines = [
                [
                    row.arm,
                    str(len(row.seeds)),
                    f"{row.seconds:.0f}",
                    *(found.get(row.arm, "") for found in cells.values()),
                ]
                for row in metrics[RECALL]
                if any(row.arm in found for found in cells.values())
            ]
            head = ["arm", "seeds", "seconds", *columns.values()]
            table = [head, ["---"] * len(head), *lines]
            parts += ["\n".join(f"| {' | '.join(line)} |" for line in table)] if lines else []
    return "\n\n".join(parts) + "\n"


def _cell(row: Row) -> str:
    if "R@1" not in row.metric and "probe" not in row.metric:
        return _number(row.mean)
    if row.arm == row.baseline:
        return f"{row.mean:.1f}"
    return f"{row.mean:.1f}, {row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f})"


def _sections(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by corpus, share of swapped captions and baseline, then by metric."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        title = f"{row.corpus}, {row.noise:.0%} of the captions swapped, against {row.baseline}"
        found.setdefault(title, {}).setdefault(row.metric, []).append(row)
    return found


def _plain(row: Row) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in asdict(row).items()}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 5) if math.isfinite(value) else None


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.4f}"
