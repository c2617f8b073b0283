"""`python -m ask_dist.bench`: all figures into runs/bench/bench.json, the machine beside them."""

from __future__ import annotations

import json
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from ask_dist.bench.bank import bank_actor_vs_in_process
from ask_dist.bench.loader import loader_vs_webdataset
from ask_dist.bench.machine import machine
from ask_dist.bench.trainer import trainer_figures
from ask_dist.files import write_atomically

CONFIG = Path("configs/quickstart.yaml")
SHARDS = Path("shards/sampled_scenes/test")
OUTPUT = Path("runs/bench/bench.json")


def main() -> None:
    """Measures one thing after the other and prints the table."""
    figures: dict[str, dict] = {"loader_vs_webdataset": loader_vs_webdataset(SHARDS)}
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, logging_level="error")
    try:
        figures["bank_actor_vs_in_process"] = bank_actor_vs_in_process()
    finally:
        ray.shutdown()
    figures |= trainer_figures(CONFIG)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(OUTPUT, json.dumps(figures | {"machine": machine()}, indent=1).encode())
    table = Table("figure", "ratio", "parts", title=str(machine()), title_justify="left")
    for name, parts in figures.items():
        others = ", ".join(f"{key} {value:.4g}" for key, value in parts.items() if key != "ratio")
        table.add_row(name, f"{parts['ratio']:.3f}", others)
    Console().print(table)


if __name__ == "__main__":
    main()
