"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. Each is imported only if asked for."""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

log = logging.getLogger(__name__)

FOLDER = "tracking"
EXPERIMENT = "ask-dist"
CLOSING_SECONDS = 60.0
PARAMETERS_A_CALL = 100  # of MLflow's REST API


class Tracker(Protocol):
    """A tracker that is open; any of its calls may raise whatever its library raises."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder; of steps from `first_step` on, TensorBoard shows those written last."""

    def __init__(self, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(_folder(config) / "tensorboard"), purge_step=first_step)
        for summary in hparams(parameters(config), {}):
            self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B. Its own step only ever grows, so the global step is a metric, which all are drawn over."""

    def __init__(self, config: Config, first_step: int) -> None:
        import wandb

        tracking = config.tracking
        place = {"project": tracking.wandb}
        known = _stored(config, "wandb", place) or secrets.token_hex(4)
        self._run = wandb.init(
            project=tracking.wandb,
            name=config.name,
            id=known,
            resume=None if tracking.wandb_mode == "offline" else "allow",
            mode=tracking.wandb_mode,
            dir=_folder(config),
            config=parameters(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        _store(config, "wandb", place, known)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, in the experiment that MLFLOW_EXPERIMENT_NAME names, else in `ask-dist`."""

    def __init__(self, config: Config, first_step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        place = {"uri": config.tracking.mlflow}
        self._client = MlflowClient(config.tracking.mlflow)
        known = _stored(config, "mlflow", place)
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run = known
            return
        name = MLFLOW_EXPERIMENT_NAME.get() or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=config.name).info.run_id
        params = [Param(key, str(value)) for key, value in parameters(config).items()]
        for start in range(0, len(params), PARAMETERS_A_CALL):
            self._client.log_batch(self._run, params=params[start : start + PARAMETERS_A_CALL])
        _store(config, "mlflow", place, self._run)

    def log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        # MLflow refuses an @ in a name.
        row = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=row)

    def close(self) -> None:
        self._client.set_terminated(self._run)


TRACKERS: dict[str, Callable[[Config, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
}


class Feed:
    """Hands rows to one tracker in a thread of its own, so that no step waits for a server.

    The tracker opens with the first row. The first error, when its library has given up trying again, ends the feed.

    Args:
        name: one of TRACKERS.
        config: the run.
    """

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self._config = config
        self._rows: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._follow, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Returns at once."""
        if self._thread.is_alive():
            self._rows.put((metrics, step))

    def close(self) -> None:
        """Waits for the rows on their way, a minute at most."""
        self._rows.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            self._warn(f"took longer than {CLOSING_SECONDS:g} s for its last rows")

    def take_problem(self) -> str | None:
        """One line of what went wrong, the first time that it is asked for."""
        problem, self._problem = self._problem, None
        return problem

    def _follow(self) -> None:
        tracker: Tracker | None = None
        try:
            while (row := self._rows.get()) is not None:
                tracker = tracker or TRACKERS[self.name](self._config, row[1])
                tracker.log(*row)
            if tracker is not None:
                tracker.close()
        except Exception as error:  # whatever these libraries raise: the run matters more than who watches it
            self._warn(f"failed: {_line(error)}")

    def _warn(self, what: str) -> None:
        self._problem = f"{self.name} {what}; the run goes on without it, metrics.jsonl has every row"
        log.warning("%s", self._problem)


def feeds(config: Config) -> list[Feed]:
    """One for each tracker that the configuration asks for."""
    return [Feed(name, config) for name in TRACKERS if getattr(config.tracking, name)]


def check_trackers(config: Config) -> None:
    """Refuses trackers that can't work, before a run starts. A server that is away is found out later.

    Raises:
        InputError: a package is not installed, W&B has no key, MLflow can't use that URI, or the URI holds a password.
    """
    for name in TRACKERS:
        spec = find_spec(name) if getattr(config.tracking, name) else None
        # A folder of that name where the command runs, such as W&B's own, counts as a package without an origin.
        if getattr(config.tracking, name) and (spec is None or spec.origin is None):
            raise InputError(
                f"tracking.{name} needs the package {name}, which is not installed; "
                f"pip install 'ask-dist[{name}]', or leave tracking.{name} out"
            )
    if config.tracking.wandb and config.tracking.wandb_mode == "online" and "WANDB_API_KEY" not in os.environ:
        _check_wandb()
    if config.tracking.mlflow:
        _check_mlflow(config.tracking.mlflow)


def _check_wandb() -> None:
    import wandb

    try:
        known = wandb.login(prompt=False)  # looks for a stored key
    except Exception as error:  # the library has several classes for it
        raise InputError(f"tracking.wandb: {_line(error)}; set WANDB_API_KEY") from None
    if not known:
        raise InputError("tracking.wandb finds no key; set WANDB_API_KEY, or tracking.wandb_mode=offline")


def _check_mlflow(uri: str) -> None:
    from mlflow import MlflowClient

    if urlsplit(uri).password is not None:
        raise InputError(
            "tracking.mlflow holds a password, which the run's files would show; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise InputError(f"tracking.mlflow={uri} is relative, workers run in another folder; write sqlite:////ABSOLUTE")
    try:
        MlflowClient(uri)
    except Exception as error:  # no store of this kind here; the library has several classes for it
        raise InputError(
            f"tracking.mlflow={uri} can't be used: {_line(error)}; name an http(s):// server, or for sqlite:/// "
            "install the whole package mlflow"
        ) from None


def parameters(config: Config) -> dict[str, bool | int | float | str | None]:
    """The resolved configuration as trackers take it: `section.key` to a plain value; lists and mappings as JSON."""
    flat: dict[str, bool | int | float | str | None] = {}

    def add(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = json.dumps(value) if isinstance(value, list | dict) else value

    add(config.model_dump(mode="json"), "")
    return flat


def _folder(config: Config) -> Path:
    folder = config.run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    return folder


def _stored(config: Config, name: str, place: dict[str, str | None]) -> str | None:
    """The id under which a tracker knows this run, if it was stored for the same place."""
    path = _folder(config) / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found.get("id") if place.items() <= found.items() else None


def _store(config: Config, name: str, place: dict[str, str | None], known: str) -> None:
    write_atomically(_folder(config) / f"{name}.json", json.dumps({"id": known, **place}).encode())


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
