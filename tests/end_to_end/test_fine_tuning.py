"""A run that uses every way of fine-tuning: what it was scored by is what it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import ask_dist

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FINE_TUNING = [
    "optimization.zero_stage=3",
    "optimization.layer_decay=0.8",
    "optimization.ema_decay=0.9",
    "optimization.activation_checkpointing=true",
    "model.audio.freeze=true",
    "model.audio.unfreeze_at=0.3",
    "model.text.lora={rank: 4, targets: [linear1, linear2]}",
]


def test_what_a_fine_tuned_run_was_scored_by_is_what_it_leaves(config_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra ask-dist[pretrained]")
    checked = ask_dist("check", config_file, *FINE_TUNING)
    assert checked.returncode == 0, checked.stderr
    done = ask_dist("train", config_file, *FINE_TUNING)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tones"
    report = json.loads((run / "report.json").read_text())
    scored = ask_dist("evaluate", run, "--output", tmp_path / "scores.json")
    assert scored.returncode == 0, scored.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    for direction in ("text_to_audio", "audio_to_text"):
        assert scores[direction] == pytest.approx(report[direction], abs=1e-6)
    losses = [row["train/loss"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in row]
    assert losses[-1] < losses[0]
