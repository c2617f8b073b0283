"""All trials of an ablation as Ray tasks, each kept on disk once it is done."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ask_dist import cluster
from ask_dist.ablation.analysis import Outcomes, rows
from ask_dist.ablation.inputs import SPLITS, load_inputs
from ask_dist.ablation.report import print_table, write_report
from ask_dist.ablation.space import Ablation, Trial
from ask_dist.ablation.trial import Outcome, run_trial
from ask_dist.bench.machine import machine
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

CACHE = Path(".cache/ablation")


def ablate(ablation: Ablation, console: Console, *, only_report: bool = False) -> Path:
    """Runs the trials that are not done yet, and writes ablation.json, ablation.md, ablation.html and plots.

    A trial is done when its file holds an outcome of exactly these settings, so a second call goes on where the first
    was interrupted, and repeats what was changed.

    Args:
        ablation: what to compare.
        console: where progress and the table go.
        only_report: run nothing; report what is done.

    Returns:
        The folder.

    Raises:
        InputError: the shards are missing, or nothing is done and nothing is to be run.
    """
    folder = ablation.folder
    trials = ablation.trials()
    missing = [] if only_report else [trial for trial in trials if read_outcome(folder, trial) is None]
    failed = _run(ablation, missing, console) if missing else {}
    done = [(trial, read_outcome(folder, trial)) for trial in trials]
    outcomes: Outcomes = {
        (trial.corpus_name, trial.swapped, trial.arm_name, trial.seed): outcome
        for trial, outcome in done
        if outcome is not None
    }
    if not outcomes:
        reason = next(iter(failed.values()), "nothing was run; leave --report-only out")
        raise InputError(f"no trial of {folder} is done: {reason}")
    found = rows(ablation, outcomes)
    write_report(folder, ablation, found, machine())
    print_table(found, console)
    for key, reason in failed.items():
        console.print(f"[red]failed[/] {key}: {reason}", highlight=False, soft_wrap=True)
    console.print(f"{len(outcomes)} of {len(trials)} trials done; report: {folder / 'ablation.html'}", soft_wrap=True)
    return folder


def read_outcome(folder: Path, trial: Trial) -> Outcome | None:
    """What a finished trial of exactly these settings found, or None."""
    try:
        stored = json.loads(_file(folder, trial).read_text(encoding="utf-8"))
        if stored["settings"] != _digest(trial):
            return None
        return Outcome(
            stored["metrics"], {name: np.array(values, np.float64) for name, values in stored["values"].items()}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_and_keep(tree: dict[str, Any], folder: Path, cache: Path) -> None:
    """One trial, and its file."""
    trial = Trial.model_validate(tree)
    outcome = run_trial(trial, cache)
    values = {
        name: [None if math.isnan(value) else round(value, 6) for value in found.tolist()]
        for name, found in outcome.values.items()
    }
    stored = {"settings": _digest(trial), "trial": tree, "metrics": outcome.metrics, "values": values}
    write_atomically(_file(folder, trial), json.dumps(stored).encode())


def _run(ablation: Ablation, trials: list[Trial], console: Console) -> dict[str, str]:
    """Runs trials, as many at once as the cluster has cores for; returns the reasons of those that failed."""
    cache = CACHE.absolute()
    anchored = [_anchored(trial) for trial in trials]
    for corpus in {trial.corpus_name: trial.corpus for trial in anchored}.values():
        for split in SPLITS:
            load_inputs(corpus, split, cache)  # once here, or every trial would compute them
    (ablation.folder / "trials").mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with cluster.session(dashboard=False), _bar(console, len(trials)) as advance:
        task = ray.remote(num_cpus=ablation.cpus_per_trial)(run_and_keep)
        running = {task.remote(trial.model_dump(mode="json"), ablation.folder, cache): trial.key for trial in anchored}
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            key = running.pop(ready)
            try:
                ray.get(ready)
            except ray.exceptions.RayError as error:
                failed[key] = str(error).strip().splitlines()[-1]
            advance(key)
    return failed


def _anchored(trial: Trial) -> Trial:
    """The same trial for processes that have another working folder."""
    corpus = trial.corpus.model_copy(update={"shards": trial.corpus.shards.absolute()})
    return trial.model_copy(update={"corpus": corpus})


def _file(folder: Path, trial: Trial) -> Path:
    return folder / "trials" / f"{trial.key}.json"


def _digest(trial: Trial) -> str:
    """Of everything that a trial's outcome depends on but its code; where the shards lie does not matter."""
    tree = _anchored(trial).model_dump(mode="json")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Trials done, time taken and time left; without a terminal a line a trial."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    done, hidden = 0, not console.is_terminal
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=hidden) as progress:
        task = progress.add_task("", total=total)

        def advance(key: str) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=1, description=key)
            if hidden:
                console.print(f"{done}/{total} {key}", highlight=False)

        yield advance
