"""A run on augmented clips, in bf16 with its optimizer on the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import ask_dist

pytestmark = pytest.mark.ray


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_a_run_on_augmented_clips_learns_and_mixed_rows_stay_out_of_the_bank(config_file: Path, tmp_path: Path) -> None:
    augment = ("augment.time_mask=0.2", "augment.frequency_mask=0.2", "augment.mix_share=0.5")
    engine = ("optimization.precision=bf16", "optimization.zero_stage=2", "optimization.offload=optimizer")
    done = ask_dist("train", config_file, *augment, *engine)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tones"
    report = json.loads((run / "report.json").read_text())
    assert report["bank"]["rows"] <= 160  # mixtures would be further ones
    assert 0.3 * 10 * 160 < report["bank"]["upserts"] < 0.7 * 10 * 160
    found = losses(run)
    assert found[max(found)] < found[1]
