"""What a bank's work costs, as `make bench-bank` measured it: the constants of the queueing model.

`python -m ask_dist.plan.constants runs/bench/bank.json` makes the figures of a run of the bench the ones that ship.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from ask_dist.config import Section, validated
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

SHIPPED = Path(__file__).with_name("constants.yaml")
MEASURED = Path("runs/bench/bank.json")
FIGURE = "planner_constants"
COMMAND = "python -m ask_dist.bench.service --only planner_constants"
GPU = "_gpu"  # after an index's name: measured where the bank saw a GPU

Seconds = Annotated[float, Field(ge=0.0)]
Precision = Literal["float16", "float32"]


class Line(Section):
    """fixed + growth x."""

    fixed: Seconds
    growth: Seconds

    def at(self, x: float) -> float:
        return self.fixed + self.growth * x


class Constants(Section):
    """Costs of one core and one thread, of rows that are `dim` wide.

    Attributes:
        machine: processor, cores, GPU and commit that they were measured with; `measured` says how, in words.
        neighbours: k of the searches.
        search: by index, seconds of one query against one modality; x is the rows of a flat index, and the square root
            of the rows of inverted files, since both the lists and the rows in one grow like it.
        upsert: by index, seconds a row and upsert, in both modalities.
        snapshot, commit: seconds a row that the bank's lock is held while the refiner copies it or writes it back.
        look: seconds, beyond those of the call, in which a primary finds what was written since a replica last asked; x
            is the rows of the shard.
        refine: by strategy, seconds of a generation on the refiner's core but for its prototypes; x is the bank's rows.
        prototypes: seconds of a generation's prototypes; x is the rows that they are made of, `prototype_rows` at most.
        encoding: seconds of a clip that is encoded again, read and decoded, by those of a clip that is trained on.
        call: seconds that a call keeps the actor busy beyond its work. round_trip: of one call that does nothing.
        submit: seconds that a call keeps the caller busy.
        byte: seconds to put a byte into Ray's object store.
        memory: by index and precision, peak bytes a row of the bank's process; x is `model.embedding_dim`.
    """

    measured: str = ""
    machine: dict[str, str | int | None]
    dim: Annotated[int, Field(ge=1)]
    neighbours: Annotated[int, Field(ge=1)]
    search: dict[str, Line]
    upsert: dict[str, Seconds]
    snapshot: Seconds
    commit: Seconds
    look: Line
    refine: dict[str, Line]
    prototypes: Line
    prototype_rows: Annotated[int, Field(ge=1)]
    encoding: Annotated[float, Field(ge=0.0)]
    call: Seconds
    round_trip: Seconds
    submit: Seconds
    byte: Seconds
    memory: dict[str, dict[Precision, Line]]

    def indexes(self, gpu: bool) -> tuple[str, ...]:
        """The kinds of index that were measured, on a GPU or on the CPU.

        Raises:
            InputError: a GPU is asked for, and none was there when these were measured.
        """
        found = tuple(name.removesuffix(GPU) for name in self.search if name.endswith(GPU) == gpu)
        if not found:
            where = "with a GPU" if gpu else "without a GPU"
            raise InputError(f"no search was measured {where}: run `{COMMAND}` on such a machine, or {_other(gpu)}")
        return found

    def query_seconds(self, index: str, rows: float, dim: int, gpu: bool) -> float:
        """Seconds of one query against one modality of `rows` rows that are `dim` wide."""
        line = self.search[index + GPU * gpu]
        return line.at(growth_of(index, rows)) * dim / self.dim

    def generation_seconds(self, strategy: str, rows: float, dim: int) -> float:
        """Seconds of a generation of the refiner over `rows` rows that are `dim` wide, on a core of its own."""
        prototypes = self.prototypes.at(min(rows, self.prototype_rows))
        return (self.refine[strategy].at(rows) + prototypes) * dim / self.dim

    def bytes_a_row(self, index: str, precision: Precision, dim: int) -> float:
        """Peak bytes a row, both modalities, all that the bank's process keeps for it."""
        return self.memory[index][precision].at(dim)


def growth_of(index: str, rows: float) -> float:
    """What the search time of an index is linear in."""
    return rows if index == "flat" else math.sqrt(rows)


def load(path: Path | None = None) -> Constants:
    """The constants of a bench's bank.json, or of a YAML file like the one that ships.

    Args:
        path: of the file; None: runs/bench/bank.json if it has them, else those that ship.

    Raises:
        InputError: the file is missing, or holds none.
    """
    if path is None:
        path = MEASURED if MEASURED.is_file() and FIGURE in _tree(MEASURED) else SHIPPED
    tree = _tree(path)
    if path.suffix == ".json":
        if FIGURE not in tree:
            raise InputError(f"{path} has no figure {FIGURE}: run `{COMMAND}`")
        figure = tree[FIGURE]
        if missing := [name for name in Constants.model_fields if name not in figure]:
            raise InputError(f"{path} is older than {', '.join(missing)} of {FIGURE}: run `{COMMAND}`")
        tree = {name: value for name, value in figure.items() if name in Constants.model_fields}
    return validated(Constants, tree, path)


def ship(measured: Path, target: Path = SHIPPED) -> None:
    """Makes the constants of a bench's bank.json the ones that ship.

    Raises:
        InputError: as for `load`.
    """
    text = yaml.safe_dump(load(measured).model_dump(mode="json"), sort_keys=False, width=110)
    write_atomically(target, f"# {COMMAND}; python -m ask_dist.plan.constants {MEASURED}\n{text}".encode())


def _tree(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"no file {path} of constants: run `{COMMAND}`, or leave --constants out") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds {type(tree).__name__}, not a mapping: give the bench's bank.json")
    return tree


def _other(gpu: bool) -> str:
    return "leave --gpu out" if gpu else "add --gpu"


if __name__ == "__main__":
    try:
        ship(Path(sys.argv[1]) if len(sys.argv) > 1 else MEASURED)
    except InputError as problem:
        sys.exit(f"error: {problem}")
