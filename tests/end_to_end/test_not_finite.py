"""A run whose steps come to be no numbers goes back to its checkpoint, and ends with one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ask_dist import config as configuration
from ask_dist.errors import InputError
from ask_dist.train.run import train


@pytest.mark.ray
def test_steps_that_are_not_finite_end_the_run_after_its_returns(config_file: Path):
    overrides = ("optimization.learning_rate=1.0e+30", "optimization.max_skipped=3", "knowledge.enabled=false")
    config = configuration.load(config_file, [*overrides, "optimization.gradient_clip=0", "cluster.max_failures=1"])
    with pytest.raises(InputError, match=r"^3 steps in a row .* lower optimization.learning_rate \(1 returns"):
        train(config)
    assert not (config.run_dir / "report.json").exists()
