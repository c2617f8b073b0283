"""metrics.jsonl and the clock of a step's stages."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ask_dist.errors import InputError
from ask_dist.train.progress import Follower
from ask_dist.train.tracking import AuditLog, MetricsLog, StageClock, last_time


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_readable_while_the_run_goes_on(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log({"train/loss": 2.5, "train/epoch": 0.5}, 10)
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 10, "time": row["time"], "train/loss": 2.5, "train/epoch": 0.5}
    log.log({}, 20)
    log.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [10, 20]


def test_what_a_killed_run_trained_on_stays_and_the_resumed_one_adds_to_it(tmp_path):
    path = tmp_path / "audit.jsonl"
    AuditLog(path).log(0, [7, 2**62])
    with open(path, "a") as file:
        file.write('{"step": 1, "ids": [3,')  # killed here
    again = AuditLog(path)
    again.log(0, [7, 8])
    again.log(1, [])
    assert rows(path) == [{"step": 0, "ids": [7, 2**62]}, {"step": 0, "ids": [7, 8]}, {"step": 1, "ids": []}]


def test_values_that_are_not_finite_become_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log({"a": math.nan, "b": math.inf, "c": -math.inf}, 1)
    log.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["a"], row["b"], row["c"]) == (None, None, None)


def test_a_resumed_run_goes_on_in_the_same_file_and_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, elapsed=100.0).log({}, 1)
    assert last_time(path) >= 100.0
    MetricsLog(path, last_time(path)).log({}, 2)
    first, second = rows(path)
    assert second["time"] >= first["time"] >= 100.0


def test_a_line_that_a_kill_cut_off_is_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, elapsed=5.0).log({"train/loss": 1.0}, 1)
    with open(path, "a") as file:
        file.write('{"step": 2, "ti')
    assert last_time(path) >= 5.0
    MetricsLog(path, last_time(path)).log({"train/loss": 0.5}, 3)
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [(1, 1.0), (3, 0.5)]


def test_a_follower_sees_the_rows_of_the_resumed_run_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).log({}, 1)
    with open(path, "a") as file:
        file.write('{"step": 2, "train/loss": 1.2345, "ti')
    follower = Follower(path)
    assert list(follower.rows()) == []
    log = MetricsLog(path)
    log.log({}, 3)
    assert [row["step"] for row in follower.rows()] == [3]
    log.log({}, 4)
    assert [row["step"] for row in follower.rows()] == [4]
    assert list(follower.rows()) == []


def test_a_full_disk_is_one_line():
    with pytest.raises(InputError, match="/dev/full can't be written: No space left on device"):
        MetricsLog(Path("/dev/full")).log({}, 1)


@pytest.mark.parametrize("content", ["", "no JSON\n", "[1]\n", '{"step": 1}\n', '{"time": null}\n'])
def test_no_usable_row_means_no_time(tmp_path, content):
    assert last_time(tmp_path / "missing.jsonl") == 0.0
    (tmp_path / "metrics.jsonl").write_text(content)
    assert last_time(tmp_path / "metrics.jsonl") == 0.0


def test_the_clock_gives_seconds_a_step_by_stage():
    clock = StageClock(torch.device("cpu"))
    for _ in range(4):
        with clock("forward"):
            time.sleep(0.01)
        with clock("loss"), clock("gather"):
            pass
        clock.step()
    taken = clock.take()
    assert set(taken) == {"time/forward", "time/loss", "time/gather"}
    assert taken["time/forward"] >= 0.01  # sleep never ends early
    assert taken["time/loss"] >= taken["time/gather"] >= 0
    assert clock.take() == {}


@pytest.mark.gpu
def test_on_a_gpu_a_stage_lasts_as_long_as_its_kernels_and_nothing_waits_for_them():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    clock, queued = StageClock(torch.device("cuda")), 0.0
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    with clock("forward"):
        for _ in range(200):
            matrix = matrix @ matrix / 64
        queued = time.perf_counter() - started
    with clock("loss"):
        pass
    clock.step()
    taken = clock.take()
    assert taken["time/forward"] > 2 * queued
    assert taken["time/loss"] < 0.1 * taken["time/forward"]


def test_the_clock_counts_a_stage_that_fails():
    clock = StageClock(torch.device("cpu"))

    def fail() -> None:
        with clock("backward"):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        fail()
    assert set(clock.take()) == {"time/backward"}
