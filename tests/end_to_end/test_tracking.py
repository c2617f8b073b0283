"""A run that is watched, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import ask_dist

pytestmark = pytest.mark.ray

STAGES = {"data", "knowledge", "forward", "loss", "backward", "step"}


def test_a_run_leaves_a_trace_of_its_stages_and_its_memory(finished: Path) -> None:
    (trace,) = (finished / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events if event.get("cat") == "user_annotation"} >= STAGES
    throughput = json.loads((finished / "report.json").read_text())["throughput"]
    assert throughput["memory/rss_gib"] > 0.1
    # Clips of one second.
    assert throughput["audio_hours_per_second"] == pytest.approx(throughput["samples_per_second"] / 3600)


def test_a_tracker_that_can_not_work_is_named_before_the_run(config_file: Path, tmp_path: Path) -> None:
    for command in ("check", "train"):
        done = ask_dist(command, config_file, "tracking.mlflow=http://me:hidden@host")
        assert done.returncode == 2
        assert "tracking.mlflow" in done.stderr  # not installed, or a password in the wrong place
        assert "hidden" not in done.stderr
    assert not (tmp_path / "runs" / "tones").exists()
