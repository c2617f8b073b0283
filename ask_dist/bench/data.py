"""`python -m ask_dist.bench.data`: the figures of packing and reading into runs/bench/data.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from ask_dist.bench.loader import loader_vs_open_clip, loader_vs_webdataset, start_of_epoch
from ask_dist.bench.machine import machine
from ask_dist.bench.pack import pack_vs_bare_loop
from ask_dist.files import write_atomically

SHARDS = Path("shards/sampled_scenes/test")
FIGURES: dict[str, Callable[[], dict[str, float] | dict[str, str]]] = {
    "pack_vs_bare_loop": pack_vs_bare_loop,
    "loader_vs_webdataset": partial(loader_vs_webdataset, SHARDS),
    "loader_vs_webdataset_2_processes": partial(loader_vs_webdataset, SHARDS, processes=2),
    "loader_vs_open_clip": partial(loader_vs_open_clip, SHARDS),
    "start_of_epoch": start_of_epoch,
}
OUTPUT = Path("runs/bench/data.json")


def main() -> None:
    """Measures one thing after the other and writes what it found after each."""
    console = Console()
    measured: dict[str, dict] = {"machine": machine()}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in FIGURES.items():
        measured[name] = measure()
        write_atomically(OUTPUT, json.dumps(measured, indent=1).encode())
        shown = {part: v if isinstance(v, str) else f"{v:.4g}" for part, v in measured[name].items()}
        parts = ", ".join(f"{part} {value}" for part, value in shown.items())
        console.print(f"{name}: {parts}", highlight=False)


if __name__ == "__main__":
    main()
