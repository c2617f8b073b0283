"""A run whose steps come to be no numbers goes back to its checkpoint, and ends with one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ask_dist import config as configuration
from ask_dist.errors import InputError
from ask_dist.train.run import train
from tests.end_to_end.command import ask_dist
from tests.end_to_end.test_disk import checkpoints, interrupt, metrics, start, wait_for_checkpoints


@pytest.mark.ray
def test_steps_that_are_not_finite_end_the_run_after_its_returns(config_file: Path):
    overrides = ("optimization.learning_rate=1.0e+30", "optimization.max_skipped=3", "knowledge.enabled=false")
    config = configuration.load(config_file, [*overrides, "optimization.gradient_clip=0", "cluster.max_failures=1"])
    with pytest.raises(InputError, match=r"^3 steps in a row .* lower optimization.learning_rate \(1 returns"):
        train(config)
    assert not (config.run_dir / "report.json").exists()


@pytest.mark.ray
def test_a_run_returns_to_its_last_checkpoint_as_often_as_it_may(config_file: Path, tmp_path: Path):
    run = tmp_path / "runs" / "tones"
    settings = (config_file, "optimization.epochs=30", "optimization.log_every=1", "knowledge.enabled=false")
    process = start("train", *settings)
    wait_for_checkpoints(run, 1, process)
    interrupt(process)
    before, saved = len(metrics(run)), json.loads(checkpoints(run)[-1].read_text())["global_step"]
    broken = ("optimization.learning_rate=1.0e+30", "optimization.gradient_clip=0", "optimization.max_skipped=3")
    ended = ask_dist("train", *settings, *broken, "--resume")
    assert ended.returncode == 2
    assert "(1 returns" in ended.stderr
    steps = [row["step"] for row in metrics(run)[before:]]
    assert steps == 2 * [saved + 1, saved + 2, saved + 3]  # an update, and two of the three that none came of
    assert json.loads(checkpoints(run)[-1].read_text())["global_step"] == saved
