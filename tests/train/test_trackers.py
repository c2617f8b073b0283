"""Trackers with their real libraries: what they were told is read back from what they wrote."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.train.trackers import check_trackers, feeds, parameters
from ask_dist.train.tracking import MetricsLog


def needs(package: str) -> pytest.MarkDecorator:
    # A folder named `wandb` in the working folder is no package: it has no origin.
    spec = find_spec(package)
    return pytest.mark.skipif(spec is None or spec.origin is None, reason=f"the extra {package} is not installed")


def run_of(folder: Path, **tracking: Any) -> Config:
    """A run with an empty folder."""
    tree = {"name": "seen", "output_dir": str(folder), "data": {"train": "shards"}, "tracking": tracking}
    config = configuration.parse(tree)
    config.run_dir.mkdir(exist_ok=True)
    return config


def write(config: Config, *rows: tuple[dict[str, float], int]) -> list[dict[str, Any]]:
    """What a run that logs these rows and ends leaves in metrics.jsonl."""
    path = config.run_dir / "metrics.jsonl"
    log = MetricsLog(path, feeds=feeds(config))
    for metrics, step in rows:
        log.log(metrics, step)
    log.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    return [row["warning"] for row in rows if "warning" in row]


@needs("tensorboard")
def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = run_of(tmp_path, tensorboard=True)
    assert not warnings(write(config, ({"a": 1.0}, 1), ({"a": 2.0}, 10), ({"a": 3.0, "b": math.nan}, 20)))
    assert not warnings(write(config, ({"a": 2.5}, 10), ({"a": math.inf}, 30)))
    events = EventAccumulator(str(config.run_dir / "tracking" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 1.0), (10, 2.5), (30, math.inf)]
    told = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert told.session_start_info.hparams["optimization.warmup_share"].number_value == 0.05
    assert told.session_start_info.hparams["bank.prototypes"].string_value == "[32, 128]"


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log of blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def wandb_history(files: list[Path]) -> list[dict[str, Any]]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for path in files
        for record in wandb_records(path)
        if record.HasField("history")
    ]


@needs("wandb")
def test_wandb_offline_keeps_rows_and_its_id_over_a_resume(tmp_path):
    config = run_of(tmp_path, wandb="project", wandb_mode="offline")
    assert not warnings(write(config, ({"a": 1.0, "R@1": 50.0}, 10), ({"a": math.inf}, 20)))
    time.sleep(1.1)  # W&B names an offline run's folder by the second
    assert not warnings(write(config, ({"a": 0.5}, 10)))
    files = sorted((config.run_dir / "tracking").rglob("run-*.wandb"))
    known = json.loads((config.run_dir / "tracking" / "wandb.json").read_text())["id"]
    assert [path.name for path in files] == [f"run-{known}.wandb"] * 2
    rows, end = wandb_history(files), time.monotonic() + 30
    while len(rows) < 3 and time.monotonic() < end:  # its own process writes them
        time.sleep(0.2)
        rows = wandb_history(files)
    assert [(row["step"], row["a"]) for row in rows] == [(10, 1.0), (20, math.inf), (10, 0.5)]
    assert rows[0]["R@1"] == 50.0
    (asked, *_) = (record.run for record in wandb_records(files[0]) if record.HasField("run"))
    assert (asked.project, asked.display_name) == ("project", "seen")
    told = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in asked.config.update}
    assert told["optimization.learning_rate"] == config.optimization.learning_rate


@needs("mlflow")
def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = run_of(tmp_path, mlflow=(tmp_path / "store").as_uri())
    check_trackers(config)
    assert not warnings(write(config, ({"a": 1.0, "eval/R@1": 50.0, "b": math.nan}, 10)))
    assert not warnings(write(config, ({"a": 0.5}, 20)))
    client = MlflowClient(config.tracking.mlflow)
    experiment = client.get_experiment_by_name("ask-dist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "a")] == [
        (10, 1.0),
        (20, 0.5),
    ]
    assert run.data.metrics["eval/R_at_1"] == 50.0
    assert math.isnan(run.data.metrics["b"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "seen")
    assert run.data.params == {name: str(value) for name, value in parameters(config).items()}


@needs("mlflow")
def test_a_server_that_is_away_is_named_once_and_the_rows_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = run_of(tmp_path, mlflow="http://127.0.0.1:9")
    check_trackers(config)
    rows = write(config, ({"a": 1.0}, 10), ({"a": 2.0}, 20), ({"a": 3.0}, 30))
    assert [row["a"] for row in rows if "a" in row] == [1.0, 2.0, 3.0]
    (warning,) = warnings(rows)
    assert warning.startswith("mlflow failed: ")
    assert "the run goes on without it" in warning


@needs("mlflow")
def test_a_password_in_the_uri_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        check_trackers(run_of(tmp_path, mlflow="http://me:hidden@host:5000"))
    assert "hidden" not in str(refused.value)


@needs("mlflow")
def test_a_store_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tracking\.mlflow=nowhere://x can't be used"):
        check_trackers(run_of(tmp_path, mlflow="nowhere://x"))


@needs("mlflow")
def test_a_relative_database_is_refused(tmp_path):
    with pytest.raises(InputError, match="is relative"):
        check_trackers(run_of(tmp_path, mlflow="sqlite:///runs.db"))


@needs("wandb")
def test_wandb_online_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(InputError, match=r"set WANDB_API_KEY, or tracking\.wandb_mode=offline"):
        check_trackers(run_of(tmp_path, wandb="project"))


@pytest.mark.parametrize(("package", "asked"), [("tensorboard", True), ("wandb", "project"), ("mlflow", "http://h")])
def test_a_package_that_is_missing_is_named_before_the_run(tmp_path, monkeypatch, package, asked):
    # A folder of the package's name where the command runs must not pass for it.
    (tmp_path / package).mkdir()
    kept = [place for place in sys.path if not (Path(place or ".") / package).is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *kept])
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=rf"pip install 'ask-dist\[{package}\]'"):
        check_trackers(run_of(tmp_path, **{package: asked}))


def test_nothing_asked_for_means_nothing_imported_and_no_thread(tmp_path):
    code = (
        "import sys, threading; from pathlib import Path; from ask_dist import config; from ask_dist.train import loop;"
        "from ask_dist.train.trackers import check_trackers, feeds;"
        f"run = config.parse({{'name': 'x', 'output_dir': {str(tmp_path)!r}, 'data': {{'train': 'shards'}}}});"
        "check_trackers(run); assert feeds(run) == [];"
        "print(*sorted({'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
