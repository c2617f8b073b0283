"""A sweep by the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ask_dist import config as configuration
from tests.end_to_end.command import ask_dist

pytestmark = pytest.mark.ray


def test_a_sweep_scores_trials_and_writes_a_configuration_that_trains(config_file: Path, tmp_path: Path) -> None:
    sweep = {
        "name": "sweep",
        "base": str(config_file),
        "output_dir": str(tmp_path / "sweeps"),
        "overrides": {"cluster.num_workers": 1, "optimization.epochs": 3, "optimization.evaluate_every": 1},
        "search": {
            "knowledge.reliability.gamma": {"uniform": [0.0, 4.0]},
            "knowledge.start": {"choice": [0.1, 0.3]},
            "refine.strategy": {"choice": ["linear", "knn_mean"]},
        },
        "trials": 2,
        "concurrent": 2,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    done = ask_dist("tune", path)
    assert done.returncode == 0, done.stderr
    words = set(done.stdout.split())
    assert words >= {"gamma", "start", "strategy"}
    assert words & {"linear", "knn_mean"}
    best = configuration.load(tmp_path / "sweeps" / "sweep" / "best.yaml")
    assert 0.0 <= best.knowledge.reliability.gamma <= 4.0
    assert best.knowledge.start in (0.1, 0.3)
    reports = list((tmp_path / "sweeps" / "sweep" / "runs").glob("trial_*/metrics.jsonl"))
    assert len(reports) == 2
    again = ask_dist("tune", path)
    assert again.returncode == 2
    assert "--resume" in again.stderr
