"""Ray Tune around whole runs: each trial is a Ray Train job with a bank and a refiner of its own."""

from __future__ import annotations

import logging
import os
import re
import signal
from pathlib import Path
from typing import Any, ClassVar

from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from rich.console import Console
from rich.table import Column, Table

from ask_dist import cluster
from ask_dist import config as configuration
from ask_dist.errors import DiskError, InputError
from ask_dist.files import write_atomically, writing
from ask_dist.train import run
from ask_dist.tune.space import Distribution, Sweep

BEST = "best.yaml"
TRIAL_MEMORY = 512 * 2**20
RESERVE = 2**20


def tune(sweep: Sweep, console: Console, *, resume: bool = False) -> Path:
    """Runs the sweep, prints its table, and writes best.yaml, a configuration that `ask-dist train` takes.

    Args:
        sweep: what to search.
        console: where progress and the table go.
        resume: go on with an interrupted sweep of that name.

    Returns:
        Path of best.yaml.

    Raises:
        InputError: the folder is in use, the base run can't start, or no trial reported the metric.
        DiskError: the folder can't be written, now or later.
        KeyboardInterrupt: Ctrl-C, after Ray Tune has written where it stands.
    """
    folder = (sweep.output_dir / sweep.name).absolute()
    base = sweep.trial_config({}, sweep.name, sweep.output_dir).anchored()
    run.check_data(base)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise InputError(f"{folder} holds a sweep already; add --resume or name=ANOTHER")
    reserve = folder / ".reserve"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        reserve.write_bytes(bytes(RESERVE))
    # Why a trial failed stands in its error file, which the table names; here it would bury the one line at the end.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    with cluster.session(dashboard=base.cluster.dashboard):
        cluster.check_resources(base)
        try:
            results = _tuner(sweep, folder, resume, Watch(reserve)).fit()
        finally:
            reserve.unlink(missing_ok=True)
    if Watch.disk_errors:
        raise Watch.disk_errors[0]
    if Watch.unfinished:
        raise KeyboardInterrupt  # Ray Tune catches it to write its state, and returns as if nothing had been
    return _conclude(sweep, results, folder, console)


class Watch(ray_tune.Callback):
    """Learns how a sweep ends, and ends it once a trial could not write, as Ctrl-C does, with its state whole on disk.

    Ray Tune writes its state over the older one, so a full disk would cut it off. A little space is therefore
    reserved from the start, and given back for the last write.

    Args:
        reserve: the file that takes the space.
    """

    # Of the class, since a resumed sweep has an instance of its own, out of Ray Tune's file.
    disk_errors: ClassVar[list[DiskError]] = []
    unfinished: ClassVar[list[str]] = []

    def __init__(self, reserve: Path) -> None:
        self._reserve = reserve

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # The traceback as text: Ray Tune keeps the error itself as a pickle, and files are not to run code.
        text = Path(trial.error_file).read_text(encoding="utf-8")
        told = re.findall(rf"^{DiskError.__module__}\.{DiskError.__name__}: (.+)$", text, re.MULTILINE)
        if told:
            self.disk_errors.append(DiskError(told[-1]))
            self._reserve.unlink(missing_ok=True)
            signal.raise_signal(signal.SIGUSR1)  # Ray Tune's: writes its state and ends

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.unfinished[:] = [trial.trial_id for trial in trials if not trial.is_finished()]


def _tuner(sweep: Sweep, folder: Path, resume: bool, watch: Watch) -> ray_tune.Tuner:
    # The function itself reserves no core, its workers do; Tune refuses a trial that reserves nothing at all.
    trial = ray_tune.with_resources(
        ray_tune.with_parameters(run_trial, sweep=sweep.model_dump(mode="json"), working_dir=os.getcwd()),
        {"memory": TRIAL_MEMORY},
    )
    if resume and ray_tune.Tuner.can_restore(str(folder / "trials")):
        return ray_tune.Tuner.restore(str(folder / "trials"), trial, resume_unfinished=True, restart_errored=True)
    scheduler = ASHAScheduler(
        time_attr="training_iteration",
        max_t=1000,
        grace_period=sweep.grace_evaluations,
        reduction_factor=sweep.reduction,
    )
    return ray_tune.Tuner(
        trial,
        param_space={key: _domain(distribution) for key, distribution in sweep.search.items()},
        tune_config=ray_tune.TuneConfig(
            metric=sweep.metric,
            mode="max",
            num_samples=sweep.trials,
            search_alg=BasicVariantGenerator(max_concurrent=sweep.concurrent, random_state=sweep.seed),
            scheduler=scheduler,
            trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=ray_tune.RunConfig(name="trials", storage_path=str(folder), verbose=1, callbacks=[watch]),
    )


def run_trial(sample: dict[str, Any], *, sweep: dict[str, Any], working_dir: str) -> None:
    """One trial: a training run that reports each validation to Tune."""
    os.chdir(working_dir)
    parsed = Sweep.model_validate(sweep)
    folder = Path(parsed.output_dir).absolute() / parsed.name / "runs"
    # Without checkpoints: every report must hold the metric, and a trial that fails is started anew.
    sample = sample | {"optimization.checkpoint_every": 1e9}
    config = parsed.trial_config(sample, f"trial_{ray_tune.get_context().get_trial_id()}", folder).anchored()
    shards = run.check_data(config)
    console = Console(quiet=True)
    run.prepare_folder(config, shards["train"], console, resume=True, overwrite=False)
    actors = cluster.start_actors(config, run.steps_per_epoch(config, shards["train"]))
    try:
        run.fit(config, actors, shards["train"], console, callbacks=[TuneReportCallback()])
    finally:
        cluster.stop_actors(actors)


def _domain(distribution: Distribution) -> Any:
    if distribution.uniform:
        return ray_tune.uniform(*distribution.uniform)
    if distribution.loguniform:
        return ray_tune.loguniform(*distribution.loguniform)
    return ray_tune.choice(list(distribution.choice or ()))


def _conclude(sweep: Sweep, results: ray_tune.ResultGrid, folder: Path, console: Console) -> Path:
    """Prints the trials, best first, and writes the best one's configuration."""
    scored = []
    for result in results:
        frame = result.metrics_dataframe
        values = frame[sweep.metric].dropna() if frame is not None and sweep.metric in frame else []
        if len(values):
            scored.append((float(max(values)), result))
    if not scored:
        raise InputError(f"no trial reported {sweep.metric}; see {folder}/trials and optimization.evaluate_every")
    scored.sort(key=lambda entry: -entry[0])
    names = ("best", *short_names(list(sweep.search)), "evaluations")
    columns = (Column(name, overflow="fold") for name in names)
    table = Table(*columns, title=f"{sweep.name}: {sweep.metric}", title_justify="left")
    for score, result in scored:
        values = [_shown(result.config[key]) for key in sweep.search]
        table.add_row(f"{score:.2f}", *values, str(result.metrics.get("training_iteration", "")))
    console.print(table)
    chosen = {key: scored[0][1].config[key] for key in sweep.search}
    best = sweep.trial_config(chosen, f"{sweep.name}_best", sweep.output_dir)
    write_atomically(folder / BEST, configuration.dump(best).encode())
    errors = f", {results.num_errors} failed" if results.num_errors else ""
    console.print(f"{len(scored)} of {sweep.trials} trials scored{errors}; train with {folder / BEST}", soft_wrap=True)
    return folder / BEST


def short_names(keys: list[str]) -> list[str]:
    """Each dotted key's shortest ending that no other key ends in."""
    found = []
    for key in keys:
        parts = key.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
        alone = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
        found.append(next(alone, key))
    return found


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
