"""A run by the sigmoid loss: it learns with the knowledge on top, and what it leaves is a model like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.end_to_end.command import ask_dist

pytestmark = pytest.mark.ray

SIGLIP = ["optimization.loss=siglip", "cluster.num_workers=1", "optimization.epochs=20"]


def test_a_run_by_the_sigmoid_loss_learns_and_can_be_scored_and_exported(config_file: Path, tmp_path: Path) -> None:
    done = ask_dist("train", config_file, *SIGLIP)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tones"
    logged = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in row]
    assert logged[-1]["loss/contrast"] < 0.5 * logged[0]["loss/contrast"]
    assert logged[-1]["train/knowledge_used"] == 1.0
    with safe_open(run / "model" / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("logit_bias").item() == pytest.approx(logged[-1]["train/logit_bias"], abs=0.01)
    report = json.loads((run / "report.json").read_text())
    assert report["text_to_audio"]["R@10"] > 50.0  # chance is 25

    scored = ask_dist("evaluate", run, "--output", tmp_path / "scores.json")
    assert scored.returncode == 0, scored.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["text_to_audio"] == pytest.approx(report["text_to_audio"], abs=1e-6)
    exported = ask_dist("export", run, "--format", "safetensors", "--output", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    again = ask_dist("check", run / "config.yaml", "name=again")
    assert again.returncode == 0, again.stderr
