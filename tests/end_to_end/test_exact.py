"""Deterministic runs: killed wherever, they end as the one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from tests.end_to_end.audit import EPOCH, audited, check_audit
from tests.end_to_end.command import environment
from tests.end_to_end.conftest import configuration

pytestmark = pytest.mark.ray

EPOCHS = 12
KILL_AT = 38  # in an epoch, three steps after a checkpoint and two after a commit; knowledge is in use
LOGGED = ("train/loss", "train/gradient_norm", "train/knowledge_used", "loss/consistency", "loss/coarse")
ROWS = ("ids", "audio", "text", "step", "frame", "version", "reliability", "prototypes.0.audio", "prototypes.0.text")


def start(tones: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """A deterministic run into folder/runs/tones."""
    tree = configuration(tones, folder / "runs")
    tree["data"] |= {"audit": True}
    tree["optimization"] |= {"deterministic": True, "epochs": EPOCHS, "log_every": 1, "evaluate_every": EPOCHS}
    tree["optimization"] |= {"checkpoint_every": 7 / EPOCH}
    tree["refine"] |= {"strategy": "gnn", "every": 3 / EPOCH}
    (folder / "tones.yaml").write_text(yaml.safe_dump(tree))
    command = [str(Path(sys.executable).with_name("ask-dist")), "train", str(folder / "tones.yaml"), *overrides]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, start_new_session=True, env=environment(), text=True, **pipes)


def finish(process: subprocess.Popen[str], folder: Path) -> Path:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return folder / "runs" / "tones"


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    while not (taken := audited(folder / "runs" / "tones")) or taken[-1][0] < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    assert taken[-1][0] < EPOCH * EPOCHS - 1  # the run is not over


def kill(process: subprocess.Popen[str], chosen: Callable[[psutil.Process], bool], count: int) -> None:
    """Kills `count` of the run's processes at once."""
    victims = [child for child in psutil.Process(process.pid).children(recursive=True) if chosen(child)]
    assert len(victims) >= count
    for victim in victims[:count]:
        os.kill(victim.pid, signal.SIGKILL)


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


def decodes(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "forkserver" in " ".join(process.cmdline()) and not process.children()
    return False


def check_equal(run: Path, other: Path) -> None:
    """Losses of every step, and of the end engine, model and bank."""
    assert losses(run) == losses(other)
    name = f"checkpoints/checkpoint_{EPOCH * EPOCHS // 7 * 7:09d}"
    for file in (f"{name}/engine.safetensors", f"{name}/refiner.safetensors", "model/model.safetensors"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file
    mine, its = (load_file(next((folder / name / "bank").glob("*.safetensors"))) for folder in (run, other))
    for column in ROWS:
        np.testing.assert_array_equal(mine[column], its[column], err_msg=column)
    assert (mine["frame"] > mine["step"]).any()  # the refiner had corrected rows


def losses(run: Path) -> list[list[float]]:
    """Of each step what was logged last."""
    rows = {
        row["step"]: row
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if LOGGED[0] in row
    }
    return [[rows[step].get(name) for name in LOGGED] for step in range(1, EPOCH * EPOCHS + 1)]


@pytest.fixture(scope="module")
def whole(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    return finish(start(tones, folder), folder)


def test_a_killed_worker_changes_nothing(tones: Path, whole: Path, tmp_path: Path) -> None:
    process = start(tones, tmp_path)
    wait_for_step(process, tmp_path, KILL_AT)
    kill(process, is_worker, 1)
    run = finish(process, tmp_path)
    check_audit(whole, EPOCHS, repeated=False)
    check_audit(run, EPOCHS, repeated=True)
    check_equal(run, whole)
    used = [row[LOGGED.index("train/knowledge_used")] for row in losses(whole)]
    assert used == [0] * EPOCH * 3 + [1] * EPOCH * 9  # after a quarter of the run


@pytest.mark.slow
def test_two_runs_are_equal(tones: Path, whole: Path, tmp_path: Path) -> None:
    run = finish(start(tones, tmp_path, "bank.max_in_flight=1"), tmp_path)
    check_audit(run, EPOCHS, repeated=False)
    check_equal(run, whole)


@pytest.mark.slow
def test_all_workers_killed_change_nothing(tones: Path, whole: Path, tmp_path: Path) -> None:
    process = start(tones, tmp_path)
    wait_for_step(process, tmp_path, KILL_AT)
    kill(process, is_worker, 2)
    run = finish(process, tmp_path)
    check_audit(run, EPOCHS, repeated=True)
    check_equal(run, whole)


@pytest.mark.slow
def test_a_killed_decoding_process_changes_nothing(tones: Path, whole: Path, tmp_path: Path) -> None:
    process = start(tones, tmp_path, "data.loader_processes=1")
    wait_for_step(process, tmp_path, KILL_AT)
    kill(process, decodes, 1)
    run = finish(process, tmp_path)
    check_audit(run, EPOCHS, repeated=False)  # the worker went on
    check_equal(run, whole)


@pytest.mark.slow
def test_a_killed_driver_changes_nothing_nor_do_other_decoding_processes_from_then_on(
    tones: Path, whole: Path, tmp_path: Path
) -> None:
    process = start(tones, tmp_path)
    wait_for_step(process, tmp_path, KILL_AT)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run = finish(start(tones, tmp_path, "--resume", "data.loader_processes=1"), tmp_path)
    check_audit(run, EPOCHS, repeated=True)
    check_equal(run, whole)
