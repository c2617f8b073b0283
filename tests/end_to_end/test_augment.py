"""A run on cached vectors of frozen towers against the same run without, and one on augmented clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import ask_dist

pytestmark = pytest.mark.ray

FROZEN = ("model.audio.freeze=true", "model.text.freeze=true")
# With two workers the bank answers one before or after it has the other's rows.
REPEATABLE = (
    *("optimization.deterministic=true", "optimization.log_every=1", "optimization.micro_batch_size=32"),
    *("refine.strategy=none", "cluster.num_workers=1"),
)


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_a_run_on_cached_vectors_has_the_losses_of_one_without(config_file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name, cached in (("plain", "false"), ("cached", "true")):
        done = ask_dist("train", config_file, *FROZEN, *REPEATABLE, f"name={name}", f"data.cache_embeddings={cached}")
        assert done.returncode == 0, done.stderr
    plain, cached = losses(runs / "plain"), losses(runs / "cached")
    assert len(plain) == 50
    assert cached == pytest.approx(plain, abs=1e-4)
    assert plain[50] < plain[1]
    files = sorted((runs / ".embeddings").rglob("*.safetensors"))
    assert len(files) == 8  # of two towers, a shard each
    report = json.loads((runs / "cached" / "report.json").read_text())
    assert report["bank"]["rows"] == 160

    checked = ask_dist("check", config_file, *FROZEN, "data.cache_embeddings=true", "data.clip_seconds=0.9")
    assert checked.returncode == 2
    assert "train-0000 has 1.00 s, over data.clip_seconds=0.9" in checked.stderr


def test_a_run_on_augmented_clips_learns_and_mixed_rows_stay_out_of_the_bank(config_file: Path, tmp_path: Path) -> None:
    augment = ("augment.time_mask=0.2", "augment.frequency_mask=0.2", "augment.mix_share=0.5")
    done = ask_dist("train", config_file, *augment, "optimization.epochs=20")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tones"
    report = json.loads((run / "report.json").read_text())
    assert report["bank"]["rows"] <= 160  # mixtures would be further ones
    assert 0.3 * 20 * 160 < report["bank"]["upserts"] < 0.7 * 20 * 160
    found = losses(run)
    assert found[max(found)] < found[1]
