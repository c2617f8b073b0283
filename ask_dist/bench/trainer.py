"""How fast a whole training run is beside a bare PyTorch DDP loop, and what the knowledge costs a step."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from ask_dist import config as configuration
from ask_dist.bench.bare import bare_loop
from ask_dist.config import Config
from ask_dist.train import run

WINDOW = 10  # steps a measurement
WARM_UP = 3  # windows left out: caches fill, lanes are read for the first time


def trainer_figures(config_file: Path, steps: int = 160, rounds: int = 2) -> dict[str, dict[str, float]]:
    """Runs the trainer without knowledge, the trainer with it, and a bare DDP loop in turns, and compares medians.

    All three have the same model, data, batches, workers and threads. Figures of the trainer with knowledge are taken
    from its second epoch on: a pair's neighbours can be asked for once the bank holds it.

    Args:
        config_file: the run; its corpus should have about as many batches as `steps`.
        steps: of each run; those with knowledge are twice as long.
        rounds: runs of each.

    Returns:
        `trainer_vs_ddp` (samples/s of the trainer without knowledge by those of the loop) and
        `knowledge_step_vs_plain` (seconds of a step with knowledge by those of one without), each with its parts.
    """
    rates: dict[str, list[float]] = {"plain": [], "knowledge": [], "ddp": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in ("plain", "knowledge"):
                knowledge = name == "knowledge"
                config = bench_config(config_file, Path(folder), f"{name}_{number}", steps * (1 + knowledge), knowledge)
                rates[name] += _trainer_rates(config)
            loop = bare_loop(bench_config(config_file, Path(folder), "ddp", steps, False), WINDOW)
            rates["ddp"] += loop.rates[WARM_UP:]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "trainer_vs_ddp": {
            "trainer": medians["plain"],
            "ddp": medians["ddp"],
            "ratio": medians["plain"] / medians["ddp"],
        },
        "knowledge_step_vs_plain": {
            "knowledge": 1.0 / medians["knowledge"],
            "plain": 1.0 / medians["plain"],
            "ratio": medians["plain"] / medians["knowledge"],
        },
    }


def bench_config(
    file: Path, folder: Path, name: str, steps: int, knowledge: bool, further: dict[str, object] | None = None
) -> Config:
    """A run of so many steps below `folder` that does nothing but train; `further` settings win."""
    overrides: dict[str, object] = {
        "name": name,
        "output_dir": folder,
        "data.validation": "null",
        "optimization.epochs": 1000,
        "optimization.max_steps": steps,
        "optimization.log_every": WINDOW,
        "optimization.checkpoint_every": 1000,
        "knowledge.enabled": str(knowledge).lower(),
        "knowledge.start": 0.0,
        "knowledge.reliability.start": 0.0,
        "cluster.dashboard": "false",
        **(further or {}),
    }
    return configuration.load(file, [f"{key}={value}" for key, value in overrides.items()])


def _trainer_rates(config: Config) -> list[float]:
    return [row["train/samples_per_second"] for row in trained(config)]


def trained(config: Config) -> list[dict[str, float]]:
    """Trains, and gives the windows that count: with knowledge, those in which every step used it."""
    run.train(config, console=Console(quiet=True))
    measured = windows(config)[WARM_UP:]
    if config.knowledge.enabled:
        # The first of them is a window that began without.
        measured = [row for row in measured if row["train/knowledge_used"] == 1.0][1:]
    return measured


def windows(config: Config) -> list[dict[str, float]]:
    """The rows of a run's metrics that each stand for a whole window; in the first `WARM_UP` it warmed up."""
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        row for row in rows if "train/samples_per_second" in row and row["step"] % config.optimization.log_every == 0
    ]
