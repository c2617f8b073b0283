"""Disks that fill or become read-only during a run or a sweep, damaged checkpoints, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ask_dist.bank import snapshot, store
from ask_dist.bank.durable import recover
from ask_dist.bank.memory import KnowledgeBank
from tests.end_to_end.command import ask_dist, environment
from tests.mounts import fill, mounted

pytestmark = pytest.mark.ray

EPOCHS = "optimization.epochs=30"
ALONE = (EPOCHS, "cluster.num_workers=1", "optimization.micro_batch_size=32")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    with mounted(tmp_path / "disk", "size=32m") as folder:
        yield folder


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("ask-dist")), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/checkpoint_*/manifest.json"))


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows that were written whole: a disk that fills may cut the last one, which a resumed run drops."""
    *rows, _ = (run / "metrics.jsonl").read_text().split("\n")
    return [json.loads(row) for row in rows]


def wait_for_checkpoints(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while len(checkpoints(run)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.05)


def wait_for_steps(runs: Path, process: subprocess.Popen[str]) -> None:
    """Until any run below the folder has logged a step since it was last asked."""
    before = {path: path.stat().st_size for path in runs.glob("*/metrics.jsonl")}
    end = time.monotonic() + 120
    while all(path.stat().st_size <= before.get(path, 0) for path in runs.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no step"
        time.sleep(0.05)


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: the signal reaches every process of the terminal."""
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert stderr.splitlines()[-1] == "interrupted; run the command again to go on (train and tune: with --resume)"


def refused(process: subprocess.Popen[str]) -> str:
    """The one line with which the process gave up."""
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 2, stderr
    *notices, line = stderr.splitlines()
    assert line.startswith("error: ")
    assert all("Token authentication is enabled" in notice for notice in notices)  # Ray's own, at every start
    return line


def finishes(*arguments: str | Path) -> str:
    """Goes on with a run to its end; returns what it printed."""
    resumed = ask_dist("train", *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    return resumed.stdout


def check_banks(run: Path) -> int:
    """Sees that each checkpoint has its bank as it then was, reading every byte; the global step of the last."""
    for manifest in checkpoints(run):
        step, (path,) = json.loads(manifest.read_text())["global_step"], store.snapshots(manifest.parent / "bank")
        assert step - 5 < int(snapshot.read(path)["newest_step"]) < step  # upserts are not waited for
    return step


@pytest.mark.parametrize("durable", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_disk_that_fills_ends_the_run_with_one_line_and_neither_it_nor_damage_loses_anything(
    config_file: Path, disk: Path, durable: bool
) -> None:
    run, arguments = disk / "tones", (config_file, f"output_dir={disk}", EPOCHS, f"bank.durable={durable}")
    process = start("train", *arguments)
    wait_for_checkpoints(run, 1, process)
    ballast = fill(disk)
    line = refused(process)
    assert "can't be written: No space left on device (0.0 of 32 MiB free); free space" in line
    saved = check_banks(run)
    assert not list(run.glob("checkpoints/.unfinished"))

    ballast.unlink()
    before = len(metrics(run))
    process = start("train", *arguments, "--resume")
    wait_for_steps(disk, process)
    wait_for_checkpoints(run, 2, process)
    interrupt(process)
    intact, damaged = (manifest.parent for manifest in checkpoints(run))
    engine = damaged / "engine.safetensors"
    engine.write_bytes(engine.read_bytes()[:-1])
    # Ray Train's own list of checkpoints, as a disk that fills while it is written leaves it.
    (run / "checkpoints" / "checkpoint_manager_snapshot.json").write_text("")
    printed = finishes(*arguments)
    assert f"warning: {engine} is missing or damaged" in printed
    assert f"going on from {intact}" in printed
    report = json.loads((run / "report.json").read_text())
    assert report["throughput"]["samples_seen"] == 30 * 160
    assert report["bank"]["rows"] == 160
    first = metrics(run)[before]
    assert saved < first["step"] <= saved + 11


def test_a_full_disk_under_the_bank_costs_no_snapshot_and_no_step(config_file: Path, tmp_path: Path) -> None:
    """The bank's journal and snapshots alone lie on a small disk, which fills in the middle of the run."""
    run = tmp_path / "runs" / "tones"
    run.mkdir(parents=True)
    with mounted(run / "bank", "size=4m") as small:
        process = start("train", config_file, EPOCHS, "bank.durable=true", "optimization.log_every=5", "--resume")
        wait_for_checkpoints(run, 1, process)
        fill(small)
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
        (warning,) = [row["warning"] for row in metrics(run) if "warning" in row]
        assert warning.startswith(f"{run / 'bank'} can't be written")
        told = [row for row in metrics(run) if "bank/durable" in row]
        assert (told[0]["bank/durable"], told[-1]["bank/durable"]) == (1, 0)
        assert told[-1]["bank/failed"] == told[-1]["bank/dropped_upserts"] == 0
        report = json.loads((run / "report.json").read_text())
        assert report["throughput"]["samples_seen"] == 30 * 160
        assert report["bank"]["rows"] == 160
        kept = recover(small / "0", lambda state: KnowledgeBank.from_state(state, dim=64, capacity=500)).bank.snapshot()
        assert len(kept.ids) == 160
        assert 0 < kept.newest_step < check_banks(run)  # the checkpoints are on another disk


def test_a_folder_that_turns_read_only_ends_the_run_with_one_line(config_file: Path, disk: Path) -> None:
    run = disk / "tones"
    process = start("train", config_file, f"output_dir={disk}", *ALONE)
    wait_for_checkpoints(run, 1, process)
    with mounted(run / "checkpoints", "ro"):
        line = refused(process)
    assert str(run / "checkpoints") in line
    assert "can't be written: Read-only file system" in line


@pytest.mark.timeout(400)
def test_a_sweep_survives_ctrl_c_and_a_full_disk(config_file: Path, disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    sweep = {
        "name": "sweep",
        "base": str(config_file),
        "output_dir": str(disk),
        "overrides": {"cluster.num_workers": 1, "optimization.epochs": 20, "optimization.evaluate_every": 1},
        "search": {"knowledge.start": {"choice": [0.1, 0.3]}},
        "trials": 1,
        "concurrent": 1,
    }
    path.write_text(yaml.safe_dump(sweep))
    process = start("tune", path)
    wait_for_steps(disk / "sweep" / "runs", process)
    interrupt(process)

    process = start("tune", path, "--resume")
    wait_for_steps(disk / "sweep" / "runs", process)
    ballast = fill(disk)
    assert "metrics.jsonl can't be written: No space left on device" in refused(process)

    ballast.unlink()
    done = ask_dist("tune", path, "--resume")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 trials scored" in done.stdout
    assert (disk / "sweep" / "best.yaml").is_file()
