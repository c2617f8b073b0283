"""A corpus of tones that a small model learns within seconds, a configuration for it, and a cluster for jobs."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip
from tests.end_to_end.command import ask_dist

RATE, SECONDS = 16000, 1.0
PITCHES = {"very low": 150.0, "low": 300.0, "middle": 600.0, "high": 1200.0, "very high": 2400.0}
SHAPES = ("steady", "rising", "pulsing", "fading")
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
else:
    raise SystemExit("the head node's dashboard does not answer")
"""


def tone(pitch: float, shape: str, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(int(RATE * SECONDS)) / RATE
    glide = 1.0 + (0.8 * time / SECONDS if shape == "rising" else 0.0)
    envelope = {"pulsing": 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * 6 * time)), "fading": 1.0 - time / SECONDS}.get(
        shape, 1.0
    )
    wave = 0.5 * np.sin(2 * np.pi * pitch * rng.uniform(0.95, 1.05) * time * glide) * envelope
    return (wave + 0.005 * rng.standard_normal(len(time))).astype(np.float32)


def clips(split: str, count: int, seed: int) -> list[Clip]:
    rng = np.random.default_rng(seed)
    kinds = [(pitch, shape) for pitch in PITCHES for shape in SHAPES]
    return [
        Clip(
            key=f"{split}-{number:04d}",
            audio=tone(PITCHES[pitch], shape, rng),
            sample_rate=RATE,
            captions=(f"a {shape} tone, {pitch}", f"{pitch} and {shape}"),
            classes=(pitch, shape),
        )
        for number in range(count)
        for pitch, shape in [kinds[number % len(kinds)]]
    ]


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 160 training, 40 validation and 40 test clips."""
    folder = tmp_path_factory.mktemp("tones")
    for seed, (split, count) in enumerate({"train": 160, "validation": 40, "test": 40}.items()):
        write_shards(clips(split, count, seed), folder / split, split, clips_per_shard=40)
    return folder


def configuration(tones: Path, output_dir: Path) -> dict[str, Any]:
    """A run of ten epochs over the tones: everything switched on, small."""
    return {
        "name": "tones",
        "output_dir": str(output_dir),
        "cluster": {"dashboard": False},
        "data": {split: str(tones / split) for split in ("train", "validation", "test")} | {"clip_seconds": SECONDS},
        "model": {"embedding_dim": 64, "audio": {"width": 8}, "text": {"width": 32, "heads": 2}},
        "optimization": {"epochs": 10, "micro_batch_size": 16, "evaluate_every": 4, "checkpoint_every": 2},
        "knowledge": {"neighbours": 8, "reliability": {"rank": 8}},
        "bank": {"prototypes": [8]},
        "refine": {"interval": 0.2, "minimum_fresh": 16, "steps": 5},
    }


@pytest.fixture
def config_file(tones: Path, tmp_path: Path) -> Path:
    """The file of that configuration."""
    path = tmp_path / "tones.yaml"
    path.write_text(yaml.safe_dump(configuration(tones, tmp_path / "runs")))
    return path


@pytest.fixture(scope="session")
def finished(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run for all tests that only look at one; its configuration lies above `runs`."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tones.yaml"
    path.write_text(yaml.safe_dump(configuration(tones, folder / "runs")))
    # Long enough for the refiner to import its libraries and to commit.
    long = ("optimization.epochs=50", "optimization.evaluate_every=20")
    done = ask_dist("train", path, *long, "tracking.profile=true")
    assert done.returncode == 0, done.stderr
    assert "GiB " in done.stdout
    return folder / "runs" / "tones"


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
            *(
                str(Path(sys.executable).with_name("ray")),
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                "--node-ip-address=127.0.0.1",
            ),
            *(f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--temp-dir={temp}"),
            f"--dashboard-agent-listen-port={free_port()}",  # the default belongs to whatever Ray runs here already
        ],
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        subprocess.run([sys.executable, "-c", WAIT], env=env, check=True, timeout=90)
        yield env
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # SIGTERM would take half a minute
        head.wait(timeout=60)
