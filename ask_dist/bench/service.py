"""`python -m ask_dist.bench.service`: the bank and the refiner as a service, into runs/bench/bank.json and bank.md.

    python -m ask_dist.bench.service --only million_rows    # one measurement, by any of its figures; the others stay
    python -m ask_dist.bench.service --small                # does everything run? its numbers mean nothing

A figure has its `ratio`, the `goal` of that and whether it was `met`, its parts, and the machine and commit that it was
measured with.
"""

from __future__ import annotations

import json
import pkgutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ask_dist.errors import InputError
from ask_dist.files import write_atomically
from ask_dist.plan import constants
from ask_dist.plan.command import markdown_table

CONFIG = Path("configs/quickstart.yaml")
PRETRAINED = Path("configs/recordings.yaml")
OUTPUT = constants.MEASURED

Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """What a ratio is to reach (`at_least`) or to stay under."""

    limit: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}"

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit


@dataclass(frozen=True)
class Measurement:
    """What is measured in one go.

    Attributes:
        figures: by name, their goals; None where there is none.
        function: its name below `ask_dist.bench`, looked up when its turn comes: what it imports takes seconds, and
            the processes that it starts import this module too. Gives one figure, or several by name.
        given: what of "folder" (for large files), "config_file" (of a run) and "constants" it takes.
        config_file: of the run, where it is always the same one.
        small: sizes with which it takes seconds.
        inside_ray: whether it needs Ray to run; otherwise it starts what it needs.
    """

    figures: dict[str, Goal | None]
    function: str
    given: tuple[str, ...] = ()
    small: dict[str, Any] = field(default_factory=dict)
    config_file: Path | None = None
    inside_ray: bool = False


MEASUREMENTS = (
    Measurement(
        {"search_actor_vs_in_process": Goal(0.9, at_least=True)},
        "bank:search_actor_vs_in_process",
        small={"rows": 500, "dim": 16, "sizes": (8, 32), "queries_a_round": 32, "rounds": 2},
        inside_ray=True,
    ),
    Measurement(
        {
            "million_rows": Goal(1.0),
            "restore_vs_disk": Goal(0.5, at_least=True),
            "inverted_vs_exact": Goal(10.0, at_least=True),
        },
        "million:million_rows",
        given=("folder",),
        small={"rows": 3000, "dim": 32, "queries": 16, "rounds": 2},
    ),
    Measurement(
        {"search_p99_under_upserts": Goal(2.0)},
        "latency:search_p99_under_upserts",
        small={"rows": 2000, "dim": 16, "turn_seconds": 0.5, "turns": 2, "maintenance_seconds": 0.2},
        inside_ray=True,
    ),
    Measurement(
        {constants.FIGURE: None},
        "costs:planner_constants",
        given=("config_file",),
        small={
            **{
                "dim": 32,
                "sizes": (1000, 4000),
                "refined": (500, 1000),
                "drawn": (500, 1000),
                "passes": 1,
                "calls": 20,
            },
            **{"memory_rows": 4000, "memory_dims": (16, 64)},
        },
        inside_ray=True,
    ),
    Measurement(
        {"plan_vs_simulated_workers": None},
        "workers:plan_vs_simulated_workers",
        given=("constants",),
        small={
            **{"rows": 1000, "dim": 32, "step_seconds": 0.3, "steps": 3, "shares": (0.2, 0.5), "others_share": 0.1},
            "maintenance_seconds": 0.2,
        },
        inside_ray=True,
    ),
    Measurement(
        {"knowledge_step_100k": Goal(1.1)},
        "steps:knowledge_step_100k",
        given=("config_file",),
        small={"rows": 2000, "index": "flat", "steps": 400, "turn": 5},
    ),
    Measurement(
        {"knowledge_step_100k_pretrained": Goal(1.1)},
        "steps:knowledge_step_100k_pretrained",
        given=("config_file",),
        small={"rows": 2000, "index": "flat", "steps": 400, "turn": 5},
        config_file=PRETRAINED,
    ),
    Measurement(
        {"refiner_slowdown": Goal(1.1)},
        "steps:refiner_slowdown",
        given=("config_file",),
        small={"steps": 1600, "turn": 40},  # the refiner has to import its libraries meanwhile
    ),
)
NAMES = tuple(name for measurement in MEASUREMENTS for name in measurement.figures)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(NAMES)}; may be given again")] = None,
    small: Annotated[bool, typer.Option("--small", help="tiny sizes: does it run?")] = False,
    config: Annotated[Path, typer.Option(help="of the training runs")] = CONFIG,
    output: Annotated[
        Path, typer.Option(help="JSON file; figures that are not measured now stay as they are")
    ] = OUTPUT,
) -> None:
    """Measures one thing after the other, writes each as soon as it is there, and prints the table."""
    console = Console()
    if unknown := set(only or ()) - set(NAMES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: no such figure; there are {', '.join(NAMES)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"machine: {_machine()}", highlight=False, soft_wrap=True)
    for measurement in MEASUREMENTS:
        if only and not set(only) & set(measurement.figures):
            continue
        start = time.monotonic()
        console.print(f"{', '.join(measurement.figures)} ...", highlight=False)
        with _ray() if measurement.inside_ray else nullcontext():
            found = _measured(measurement, output, config, measurement.small if small else {})
        taken = time.monotonic() - start
        console.print(f"  {taken:.0f} s", highlight=False)
        _keep(output, {name: _whole(found[name], goal, taken) for name, goal in measurement.figures.items()})
    console.print(table(_read(output)))


def table(figures: Figures) -> Table:
    """Ratios, goals and parts of the figures that were measured."""
    shown = Table("figure", "ratio", "goal", "parts", title="the bank as a service", title_justify="left")
    for name in (name for name in NAMES if name in figures):
        parts = figures[name]
        ratio, goal = parts.get("ratio"), parts.get("goal")
        others = {key: value for key, value in parts.items() if key not in ("ratio", "goal", "met", "machine")}
        shown.add_row(
            name,
            "" if ratio is None else f"{ratio:.3f}",
            "" if goal is None else f"{goal}{'' if parts['met'] else ', missed'}",
            ", ".join(f"{key} {_short(value)}" for key, value in others.items()),
        )
    return shown


def _measured(measurement: Measurement, output: Path, config: Path, sizes: dict[str, Any]) -> Figures:
    known: dict[str, Any] = {"folder": output.parent, "config_file": measurement.config_file or config}
    if "constants" in measurement.given:
        known["constants"] = constants.load(output if constants.FIGURE in _read(output) else constants.SHIPPED)
    function = pkgutil.resolve_name(f"ask_dist.bench.{measurement.function}")
    found = function(**{name: known[name] for name in measurement.given}, **sizes)
    return found if len(measurement.figures) > 1 else dict.fromkeys(measurement.figures, found)


def markdown(figures: Figures) -> str:
    """The figures that have a ratio, and the model of `ask-dist plan` against simulated workers, as two tables."""
    rows = [
        [f"`{name}`", str(parts.get("goal", "")), f"{parts['ratio']:.3f}", str(parts["machine"]["commit"])]
        for name, parts in figures.items()
        if "ratio" in parts
    ]
    compared = [
        [
            f"{name}, {setting['workers']} workers",
            *(_pair(setting, key) for key in ("busy", "late_share", "mean_seconds", "p99_seconds")),
        ]
        for name, setting in figures.get("plan_vs_simulated_workers", {}).items()
        if isinstance(setting, dict) and "workers" in setting
    ]
    names = ["measured / predicted", "busy", "late share", "mean wait, s", "p99 wait, s"]
    return f"{markdown_table(['figure', 'goal', 'ratio', 'commit'], rows)}\n{markdown_table(names, compared)}"


def _pair(setting: dict[str, Any], key: str) -> str:
    measured, predicted = (setting.get(name) for name in (key, f"predicted_{key}"))
    return " / ".join("-" if value is None else f"{value:.3g}" for value in (measured, predicted))


@contextmanager
def _ray() -> Iterator[None]:
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


def _machine() -> dict[str, str | int | None]:
    from ask_dist.bench.machine import machine  # imports torch

    return machine()


def _whole(parts: dict[str, Any], goal: Goal | None, taken: float) -> dict[str, Any]:
    judged = {} if goal is None else {"goal": str(goal), "met": goal.met(parts["ratio"])}
    return parts | judged | {"measured_in_seconds": taken, "machine": _machine()}


def _keep(output: Path, figures: Figures) -> None:
    figures = _read(output) | figures
    write_atomically(output, json.dumps(figures, indent=1).encode())
    write_atomically(output.with_suffix(".md"), markdown(figures).encode())


def _read(output: Path) -> Figures:
    return json.loads(output.read_text()) if output.is_file() else {}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {_short(part)}' for key, part in value.items())})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(main)
    try:
        application()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
