"""`ask-dist plan`: the smallest bank for every number of workers and rows, as a table, a picture and JSON."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.files import write_atomically, writing
from ask_dist.plan.constants import GPU, Constants, growth_of
from ask_dist.plan.model import Load, Node, Outcome, breaking_point, recommend, smallest

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
}
SHOWN_ROWS = (10**4, 10**6)
Cell = Callable[["Planned"], str]


@dataclass(frozen=True)
class Planned:
    """The smallest layout for one load, and how far it reaches: the largest workers and rows, and what breaks then."""

    load: Load
    outcome: Outcome
    most_workers: int
    workers_break: str
    most_rows: int
    rows_break: str


COLUMNS: dict[str, Cell] = {
    "workers": lambda plan: f"{plan.load.workers}",
    "rows": lambda plan: f"{plan.load.rows:.3g}",
    "index": lambda plan: plan.outcome.layout.index,
    "shards x replicas": lambda plan: f"{plan.outcome.layout.shards} x {plan.outcome.layout.replicas}",
    "cores": lambda plan: f"{plan.outcome.layout.actors * plan.load.threads}",
    "busy": lambda plan: f"{plan.outcome.busy:.2f}",
    "p99 / step": lambda plan: f"{plan.outcome.answer_p99 / plan.load.step_seconds:.2f}",
    "in lockstep": lambda plan: f"{plan.outcome.lockstep_p99 / plan.load.step_seconds:.2f}",
    "late": lambda plan: f"{plan.outcome.late_share:.1%}",
    "sending": lambda plan: f"{plan.outcome.sending:.1%}",
    "GiB a shard": lambda plan: f"{plan.outcome.memory_shard / 2**30:.1f}",
    "GiB in all": lambda plan: f"{plan.outcome.memory_all / 2**30:.1f}",
    "MB/s a bank": lambda plan: f"{plan.outcome.network_bank / 1e6:.0f}",
    "MB/s a worker": lambda plan: f"{plan.outcome.network_worker / 1e6:.1f}",
    "GB/s in all": lambda plan: f"{plan.outcome.network_all / 1e9:.2f}",
    "GiB refiner": lambda plan: f"{plan.outcome.memory_refiner / 2**30:.1f}",
    "MB/s refiner": lambda plan: f"{plan.outcome.network_refiner / 1e6:.1f}",
    "refined": lambda plan: f"{plan.outcome.generation:.3g} s",
    "step": lambda plan: f"{plan.outcome.step_seconds:.3g} s",
}
WHERE_IT_BREAKS: dict[str, Cell] = {
    "workers": COLUMNS["workers"],
    "rows": COLUMNS["rows"],
    "index": COLUMNS["index"],
    "shards x replicas": COLUMNS["shards x replicas"],
    "most workers": lambda plan: f"{plan.most_workers}",
    "then": lambda plan: plan.workers_break,
    "most rows": lambda plan: f"{plan.most_rows:.3g}",
    "then ": lambda plan: plan.rows_break,
}


def span(text: str, factor: int, name: str) -> list[int]:
    """Whole numbers of "A" or "A..B": from A on, each `factor` times the one before, and B.

    Raises:
        InputError: not of that form, or not at least 1.
    """
    first, _, last = text.partition("..")
    try:
        low, high = (int(float(end)) for end in (first, last or first))
    except (ValueError, OverflowError):
        raise InputError(f"--{name} {text} is no number and no range: give one such as 512 or 8..1024") from None
    if not 1 <= low <= high <= 10**12:
        raise InputError(f"--{name} {text} must rise and lie within 1 and 1e12: give one such as 512 or 8..1024")
    values = list(itertools.takewhile(lambda value: value < high, (low * factor**power for power in itertools.count())))
    return [*values, high]


def plan(
    config: Config,
    workers: Sequence[int],
    rows: Sequence[int],
    constants: Constants,
    *,
    step_seconds: float,
    node: Node,
    clips: int | None = None,
    console: Console,
    output: Path | None = None,
    plot: Path | None = None,
    markdown: Path | None = None,
) -> list[Planned]:
    """Prints what holds how many workers and rows, and where it breaks; with one of each, for every kind of index.

    Args:
        config: batch, width, neighbours, precision, threads and refiner come from here; its own workers do not count.
        workers, rows: every pair of them is planned.
        constants: of one core.
        step_seconds: of a training step.
        node: of one actor.
        clips: of an epoch; None: as many as rows.
        output, plot, markdown: files for JSON, a PNG picture and the tables.

    Raises:
        InputError: the refiner's strategy was not measured, or no such index on this kind of node.
    """
    strategy = config.refine.strategy
    if strategy != "none" and strategy not in constants.refine:
        known = ", ".join(constants.refine)
        raise InputError(f"refine.strategy={strategy} was not measured: set one of {known}, or none")
    loads = [
        Load(
            workers=count,
            rows=size,
            step_seconds=step_seconds,
            batch=config.optimization.local_batch_size(config.cluster.num_workers),
            dim=config.model.embedding_dim,
            neighbours=config.knowledge.neighbours,
            precision=config.bank.dtype,
            threads=config.bank.threads,
            strategy=strategy,
            interval=config.refine.interval,
            cpu_share=config.refine.cpu_share,
            every=config.refine.every,
            clips=clips or size,
        )
        for size, count in itertools.product(rows, workers)
    ]
    found = [_planned(load, recommend(load, constants, node), constants, node) for load in loads]
    shown = found
    if len(loads) == 1:
        outcomes = [smallest(loads[0], index, constants, node) for index in constants.indexes(node.gpu)]
        shown = [_planned(loads[0], outcome, constants, node) for outcome in outcomes]
    title = f"{step_seconds:g} s a step, {node.memory / 2**30:g} GiB and {node.network * 8e-9:g} Gbit/s a node"
    _print(shown, COLUMNS, title, console)
    _print(shown, WHERE_IT_BREAKS, "where it breaks", console)
    if len(found) == 1:
        console.print(sentence(found[0]), highlight=False, soft_wrap=True)
    machine = ", ".join(f"{key} {value}" for key, value in constants.machine.items() if value is not None)
    console.print(f"constants: {machine}. {constants.measured}", highlight=False, soft_wrap=True)
    files: dict[Path | None, Callable[[], bytes]] = {
        output: lambda: json.dumps(
            {"constants": constants.model_dump(mode="json"), "plans": [_plain(one) for one in shown]}, indent=1
        ).encode(),
        plot: lambda: picture(found),
        markdown: lambda: "\n".join(
            [_markdown(shown, COLUMNS), _markdown(shown, WHERE_IT_BREAKS), constants_markdown(constants)]
        ).encode(),
    }
    for path, content in files.items():
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content())
    return found


def sentence(planned: Planned) -> str:
    """What holds a load, or that nothing does and why."""
    load, outcome = planned.load, planned.outcome
    asked = f"{load.workers} workers and {load.rows:.3g} rows"
    chosen = outcome.layout
    layout = f"bank.index={chosen.index} bank.shards={chosen.shards} bank.replicas={chosen.replicas}"
    if outcome.problems:
        return f"nothing within reach holds {asked}; nearest is {layout} ({'; '.join(outcome.problems)})"
    refiner = ""
    if load.strategy == "reencode":
        share = 1.0 - load.step_seconds / outcome.step_seconds
        refiner = (
            f"; every {load.steps_between:.3g} steps training stops for {outcome.reencoding:.3g} s, {share:.0%} of the "
            "time, to encode all rows again"
        )
    elif outcome.generation > load.epoch_seconds:
        refiner = (
            f"; the refiner takes {outcome.generation:.3g} s a generation, training renews every row in "
            f"{load.epoch_seconds:.3g} s: more refine.cpu_share"
        )
    return f"{asked}: {layout}{refiner}"


def _planned(load: Load, outcome: Outcome, constants: Constants, node: Node) -> Planned:
    if outcome.problems:
        why = "; ".join(outcome.problems)
        return Planned(load, outcome, 0, why, 0, why)
    workers = breaking_point(load, outcome.layout, constants, node, "workers")
    return Planned(load, outcome, *workers, *breaking_point(load, outcome.layout, constants, node, "rows"))


def _print(found: Sequence[Planned], columns: dict[str, Cell], title: str, console: Console) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for one in found:
        table.add_row(*(cell(one) for cell in columns.values()))
    console.print(table)


def _markdown(found: Sequence[Planned], columns: dict[str, Cell]) -> str:
    return markdown_table([*columns], [[cell(one) for cell in columns.values()] for one in found])


def constants_markdown(constants: Constants) -> str:
    """The constants as a table, in microseconds and bytes."""
    rows = [
        ["a call: the actor's time, and a lone one's", f"{constants.call * 1e6:.0f}, {constants.round_trip * 1e6:.0f}"],
        ["a call: the caller's time", f"{constants.submit * 1e6:.0f}"],
        ["a MB into the object store", f"{constants.byte * 1e12:.0f}"],
        [
            "a row of the refiner's snapshot, of its commit",
            f"{constants.snapshot * 1e6:.2f}, {constants.commit * 1e6:.2f}",
        ],
    ]
    for size in SHOWN_ROWS:
        rows.append([f"a replica's look at {size:.0e} rows, beyond its call", f"{constants.look.at(size) * 1e6:.0f}"])
    for index, line in constants.search.items():
        for size in SHOWN_ROWS:
            taken = line.at(growth_of(index.removesuffix(GPU), size)) * 1e6
            rows.append([f"a query against one modality of {size:.0e} rows, {index}", f"{taken:.0f}"])
    rows += [[f"an upsert's row, {index}", f"{each * 1e6:.1f}"] for index, each in constants.upsert.items()]
    rows += [
        [f"a generation of the refiner, {name}", f"{line.fixed * 1e6:.0f} + {line.growth * 1e6:.1f} a row"]
        for name, line in constants.refine.items()
    ]
    prototypes = constants.prototypes
    rows += [
        [
            f"its prototypes, of {constants.prototype_rows} rows at most",
            f"{prototypes.fixed * 1e6:.0f} + {prototypes.growth * 1e6:.1f} a row",
        ],
        ["a clip encoded again, by a clip trained on", f"{constants.encoding:.2f}"],
    ]
    rows += [
        [f"bytes of a row, {index}, {precision}", f"{line.fixed:.0f} + {line.growth:.1f} a value"]
        for index, lines in constants.memory.items()
        for precision, line in lines.items()
    ]
    return markdown_table([f"constant, rows {constants.dim} wide", "microseconds, bytes"], rows)


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Names above rows of cells."""
    lines = [[name.strip() for name in names], ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(planned: Planned) -> dict[str, Any]:
    """As JSON has it: what is infinite, since a queue grows without end, is null."""
    finite = {name: None if value == float("inf") else value for name, value in asdict(planned.outcome).items()}
    return asdict(planned) | {"outcome": finite}


def picture(found: Sequence[Planned]) -> bytes:
    """A PNG: the actors that each number of workers needs, and the share of a step that an answer takes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        actors, waits = figure.subplots(1, 2)
        for size in dict.fromkeys(one.load.rows for one in found):
            holding = [one for one in found if one.load.rows == size and not one.outcome.problems]
            broken = [one.load.workers for one in found if one.load.rows == size and one.outcome.problems]
            label = f"{size:.3g} rows" + (f" (nothing holds {min(broken)} workers)" if broken else "")
            workers = [one.load.workers for one in holding]
            actors.plot(workers, [one.outcome.layout.actors for one in holding], "o-", label=label)
            longest = [max(one.outcome.answer_p99, one.outcome.lockstep_p99) for one in holding]
            shares = [wait / one.load.step_seconds for wait, one in zip(longest, holding, strict=True)]
            waits.plot(workers, shares, "o-", label=label)
        for axes, title in ((actors, "bank actors, shards x replicas"), (waits, "p99 answer / step, worse arrival")):
            axes.set(title=title, xlabel="training workers", xscale="log")
        actors.set(yscale="log")
        figure.legend(*actors.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
