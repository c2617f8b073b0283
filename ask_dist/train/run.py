"""The driver of a run: checks, folders, Ray, one `TorchTrainer.fit`, the table at the end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console
from rich.markup import escape

from ask_dist import cluster
from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.data.captions import captions
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.evaluate.report import print_table
from ask_dist.files import DISK_ERRORS, error_number, refusal, write_atomically, writing
from ask_dist.models.text import Vocabulary
from ask_dist.train import checkpoint, loop
from ask_dist.train.progress import live
from ask_dist.train.start import check_start
from ask_dist.train.step import NotFinite
from ask_dist.train.trackers import check_trackers

VOCABULARY_CAPTIONS = 50_000
RAY_LIST = "checkpoint_manager_snapshot.json"


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Runs the whole job and returns the contents of report.json.

    Args:
        config: the run.
        resume: continue from the last checkpoint; a finished run is only shown again; a new one starts.
        overwrite: remove an earlier run of that name first.
        console: where progress and the table go.

    Raises:
        InputError: whatever the user can mend.
        KeyboardInterrupt: Ctrl-C, after the workers have ended.
    """
    console = console or Console()
    config = config.anchored()
    shards = check_data(config)
    found = prepare_folder(config, shards["train"], console, resume=resume, overwrite=overwrite)
    if (config.run_dir / "report.json").is_file():
        console.print(f"{config.run_dir} is finished; --overwrite trains it anew")
        return show(config.run_dir, console)
    os.environ["ASK_DIST_COMMAND"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    with cluster.session(dashboard=config.cluster.dashboard):
        cluster.check_resources(config)
        if idle := cluster.idle_gpus(config):
            console.print(
                f"[yellow]warning:[/] {config.cluster.num_workers} workers compute on CPUs, since the cluster has no "
                f"more than {idle} GPU; cluster.num_workers={idle} trains on GPUs",
                highlight=False,
                soft_wrap=True,
            )
        actors = cluster.start_actors(config, steps_per_epoch(config, shards["train"]))
        try:
            fit(config, actors, shards["train"], console, found)
        except SystemExit:  # what Ray Train makes of Ctrl-C
            raise KeyboardInterrupt from None
        finally:
            cluster.stop_actors(actors)
    return show(config.run_dir, console)


def check_data(config: Config) -> dict[str, ShardList]:
    """The shard lists, or InputError when a split is missing or has fewer shards than workers, or when the run can't
    start from what it names or be tracked as asked."""
    check_trackers(config)
    shards = loop.load_shards(config)
    check_start(config, shards)
    workers, count = config.cluster.num_workers, len(shards["train"].paths)
    if count < workers:
        raise InputError(
            f"{config.data.train} has {count} shards for {workers} workers; pack it with fewer clips a shard, "
            f"or set cluster.num_workers={count}"
        )
    return shards


def prepare_folder(
    config: Config, train_shards: ShardList, console: Console, *, resume: bool, overwrite: bool
) -> Path | None:
    """Makes the run's folder with its resolved config.yaml and tokenizer, or checks that it can be continued.

    Returns:
        The checkpoint to go on from, if there is one. Newer ones that are damaged are named on the console.

    Raises:
        InputError: the folder is in use, can't be continued, or can't be written.
    """
    folder = config.run_dir
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        raise InputError(f"{folder} holds a run already; add --resume, --overwrite or name=ANOTHER")
    with writing(folder):
        if overwrite and folder.is_dir():
            shutil.rmtree(folder)
        (folder / "model").mkdir(parents=True, exist_ok=True)
        # Ray Train would insist on every checkpoint that it once listed there. The folders say what there is.
        (folder / checkpoint.FOLDER / RAY_LIST).unlink(missing_ok=True)
    found, damage = checkpoint.newest_intact(folder, checkpoint.lineage(config, train_shards.fingerprint))
    for problem in damage:
        console.print(f"[yellow]warning:[/] {escape(problem)}; going on from {found}", highlight=False, soft_wrap=True)
    vocabulary = folder / "model" / Vocabulary.FILE
    tokenizer = None if vocabulary.is_file() else _tokenizer(config, train_shards)
    with writing(folder):
        write_atomically(folder / "config.yaml", configuration.dump(config).encode())
        if tokenizer is not None:
            write_atomically(vocabulary, tokenizer)
    return found


def _tokenizer(config: Config, train_shards: ShardList) -> bytes:
    """The file of the run's tokenizer: of the run that it starts from, or learned from the training captions."""
    if config.model.source is not None:
        return (config.model.source / "model" / Vocabulary.FILE).read_bytes()
    learned = Vocabulary.train(captions(train_shards, VOCABULARY_CAPTIONS), config.model.text.vocabulary)
    return learned.tokenizer.to_str().encode()


class EndAtInputError(UserCallback):
    """Ends a run at a worker's InputError: a restart can't mend that, so none of `max_failures` is spent on it."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, InputError):
                raise error  # whatever a callback raises ends the run, as a ControllerError


def fit(
    config: Config,
    actors: cluster.Actors,
    train_shards: ShardList,
    console: Console,
    found: Path | None = None,
    callbacks: Sequence[UserCallback] = (),
    train_loop: Callable[[dict[str, Any]], None] = loop.train_loop_per_worker,
) -> None:
    """Trains with Ray Train V2.

    Args:
        config: the run, with absolute paths.
        actors: of `cluster.start_actors`.
        train_shards: the training split.
        console: where progress is shown.
        found: the checkpoint to go on from.
        callbacks: of Ray Train, such as Tune's that forwards reports.
        train_loop: what each worker runs.

    Raises:
        InputError: a worker met one, the disk refused to take Ray Train's own files, or too many steps in a row were
            not finite.
    """
    gpu = cluster.use_gpu(config)
    worker = {"CPU": config.cluster.cpus_per_worker} | ({"GPU": config.cluster.gpus_per_worker} if gpu else {})
    scaling = ScalingConfig(num_workers=config.cluster.num_workers, use_gpu=gpu, resources_per_worker=worker)
    run_config = RunConfig(
        name=checkpoint.FOLDER,
        storage_path=str(config.run_dir),
        failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        callbacks=[EndAtInputError(), *callbacks],
    )
    job = {"config": config.model_dump(mode="json"), "actors": actors, "use_gpu": gpu}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job | {"checkpoint": None if found is None else str(found)},
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=run_config,
    )
    total = loop.run_length(config, steps_per_epoch(config, train_shards))
    try:
        with live(console, config.run_dir / "metrics.jsonl", total):
            trainer.fit()
    except ControllerError as error:
        cause = error.controller_failure
        code = error_number(cause)
        if code in DISK_ERRORS:
            raise refusal(config.run_dir / checkpoint.FOLDER, code) from None
        raise (cause if isinstance(cause, InputError) else error) from None
    except WorkerGroupError as error:
        for cause in error.worker_failures.values():
            if isinstance(cause, NotFinite):
                raise InputError(
                    f"{cause} ({config.cluster.max_failures} returns to a checkpoint did not help)"
                ) from None
        raise


def steps_per_epoch(config: Config, shards: ShardList) -> int:
    """Global steps that an epoch takes, as the loader counts them."""
    from ask_dist.data.order import Order

    per_lane = config.global_batch_size // config.data.lanes
    data = config.data
    order = Order(shards.counts, config.seed, data.lanes, per_lane, data.shuffle_window, shards.weights)
    return order.steps_per_epoch


def show(run_dir: Path, console: Console) -> dict[str, Any]:
    """Prints the table of a finished run and says where the rest is."""
    results = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    print_table(results, console)
    console.print(f"report: {run_dir / 'report.html'}", highlight=False, soft_wrap=True)
    return results
