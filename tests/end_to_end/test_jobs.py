"""A job on a running cluster with token authentication, submitted as a user does."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ask_dist import config as configuration

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WAIT = """
import os, time, urllib.request
request = urllib.request.Request(
    os.environ["RAY_API_SERVER_ADDRESS"] + "/api/version",
    headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]},
)
for _ in range(80):
    try:
        urllib.request.urlopen(request, timeout=2)
        break
    except OSError:
        time.sleep(1)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node on loopback, on ports of its own; yields the environment of its clients."""
    dashboard = free_port()
    temp = tmp_path_factory.mktemp("r")
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    env.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *(f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--temp-dir={temp}"),
            f"--dashboard-agent-listen-port={free_port()}",  # the default belongs to whatever Ray runs here already
        ],
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield env
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # SIGTERM would take half a minute
        head.wait(timeout=60)


def submit(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(BIN / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", *command]
    return subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(420)
def test_submitted_jobs_train_score_and_tune_and_are_refused_without_the_token(
    cluster: dict[str, str], config_file: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-c", WAIT], env=cluster, check=True, timeout=90)
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
        "trials": 2,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    tuned = submit(cluster, sys.executable, "jobs/tune.py", str(tmp_path / "sweep.yaml"))
    assert tuned.returncode == 0, tuned.stdout[-3000:] + tuned.stderr[-3000:]
    assert "2 of 2 trials scored" in tuned.stdout
    best = configuration.load(tmp_path / "sweeps" / "sweep" / "best.yaml")
    assert 0.1 <= best.knowledge.start <= 0.3
