"""A job on a running cluster with token authentication, submitted as a user does."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ask_dist import config as configuration

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def submit(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(BIN / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", *command]
    return subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(420)
def test_submitted_jobs_train_score_and_tune_and_are_refused_without_the_token(
    cluster: dict[str, str], config_file: Path, tmp_path: Path
) -> None:
    stranger = submit(cluster | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, "true")
    assert stranger.returncode != 0
    assert "oken" in stranger.stdout + stranger.stderr
    done = submit(cluster, sys.executable, "jobs/train.py", str(config_file), "optimization.epochs=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "runs" / "tones" / "report.json").read_text())
    assert report["throughput"]["samples_seen"] == 320
    scored = submit(cluster, sys.executable, "jobs/evaluate.py", str(tmp_path / "runs" / "tones"))
    assert scored.returncode == 0, scored.stdout[-3000:]

    sweep = {
        "name": "sweep",
        "base": str(config_file),
        "output_dir": str(tmp_path / "sweeps"),
        "overrides": {"cluster.num_workers": 1, "optimization.epochs": 2, "optimization.evaluate_every": 1},
        "search": {"knowledge.start": {"uniform": [0.1, 0.3]}},
        "trials": 1,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    tuned = submit(cluster, sys.executable, "jobs/tune.py", str(tmp_path / "sweep.yaml"))
    assert tuned.returncode == 0, tuned.stdout[-3000:] + tuned.stderr[-3000:]
    assert "1 of 1 trials scored" in tuned.stdout
    best = configuration.load(tmp_path / "sweeps" / "sweep" / "best.yaml")
    assert 0.1 <= best.knowledge.start <= 0.3
