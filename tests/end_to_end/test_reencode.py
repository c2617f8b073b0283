"""Runs whose workers encode the corpus again, and whose bank dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.command import environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def steps(run: Path) -> list[int]:
    """The global steps that were logged."""
    path = run / "metrics.jsonl"
    logged = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [row["step"] for row in logged if "train/loss" in row]


def bank_of(process: subprocess.Popen[str]) -> int:
    """The process of the bank."""
    (found,) = [one.pid for one in psutil.Process(process.pid).children(True) if one.name().startswith("ray::BankA")]
    return found


def test_a_run_whose_bank_dies_while_it_is_written_to_goes_on(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tones"
    often = ["refine.strategy=reencode", "refine.every=0.2", "knowledge.start=0"]
    short = ["optimization.epochs=6", "optimization.log_every=1", "optimization.checkpoint_every=6"]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ask-dist")), "train", str(config_file), *often, *short],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(steps(run)) < 10 and process.poll() is None:
        time.sleep(0.1)
    bank = bank_of(process)
    os.kill(bank, signal.SIGSTOP)
    still = 0
    while still < 30 and process.poll() is None:  # only writing waits for the bank: after three seconds it does
        before = len(steps(run))
        time.sleep(0.1)
        still = still + 1 if len(steps(run)) == before else 0
    os.kill(bank, signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert steps(run) == list(range(1, 31))  # no worker was restarted
    assert json.loads((run / "report.json").read_text())["bank"]["rows"] == 160
