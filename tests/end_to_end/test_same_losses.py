"""Runs that must have the losses of a plain one: on cached vectors of a frozen tower, and in chunks of the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ask_dist.config import Reliability
from tests.end_to_end.command import ask_dist
from tests.end_to_end.conftest import configuration

pytestmark = pytest.mark.ray

FROZEN = "model.audio.freeze=true"
# Chunks have dropout of their own, and two workers have neighbours of their own pairs.
COMPARABLE = (
    *("optimization.train_batch_size=32", "optimization.deterministic=true", "optimization.log_every=1"),
    *("model.dropout=0", "cluster.num_workers=1", "refine.strategy=none", "optimization.zero_stage=2"),
    *("data.validation=null", FROZEN),
)


def rows(run: Path) -> list[dict[str, float]]:
    """Those of steps."""
    logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in logged if "train/loss" in row]


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in rows(run)]


@pytest.fixture(scope="module")
def config_file(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same")
    (folder / "tones.yaml").write_text(yaml.safe_dump(configuration(tones, folder / "runs")))
    return folder / "tones.yaml"


def finished(config_file: Path, name: str, *overrides: str, chunk: int = 32) -> Path:
    size = f"optimization.micro_batch_size={chunk}"
    done = ask_dist("train", config_file, *COMPARABLE, f"name={name}", size, *overrides)
    assert done.returncode == 0, done.stderr
    return config_file.parent / "runs" / name


@pytest.fixture(scope="module")
def plain(config_file: Path) -> list[float]:
    found = losses(finished(config_file, "plain"))
    assert len(found) == 50
    assert found[-1] < found[0]
    return found


def test_a_run_in_chunks_has_the_losses_of_one_at_once(config_file: Path, plain: list[float]) -> None:
    run = finished(config_file, "chunks", chunk=12)
    found, last = losses(run), rows(run)[-1]
    assert last["train/samples_seen"] == 10 * 160
    assert last["train/knowledge_used"] == 1.0
    unweighted = round(Reliability().start * len(plain))
    assert found[:unweighted] == pytest.approx(plain[:unweighted], abs=1e-4)
    # Then r counts wrong pairs that agree less than a right one: of two that agree about as much, either may be ahead.
    assert found == pytest.approx(plain, abs=3e-2)


def test_a_run_on_cached_vectors_has_the_losses_of_one_without(config_file: Path, plain: list[float]) -> None:
    run = finished(config_file, "cached", "data.cache_embeddings=true")
    assert losses(run) == pytest.approx(plain, abs=1e-4)
    files = sorted((run.parent / ".embeddings").rglob("*.safetensors"))
    assert len(files) == 4  # one a shard
    report = json.loads((run / "report.json").read_text())
    assert report["bank"]["rows"] == 160


def test_clips_that_cached_vectors_would_crop_are_refused_before_a_run(config_file: Path) -> None:
    checked = ask_dist("check", config_file, FROZEN, "data.cache_embeddings=true", "data.clip_seconds=0.9")
    assert checked.returncode == 2
    assert "train-0000 has 1.00 s, over data.clip_seconds=0.9" in checked.stderr
