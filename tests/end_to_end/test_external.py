"""A run that starts from another run's weights and from a bank that these encoded, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ask_dist.data.pack import write_shards
from tests.end_to_end.command import ask_dist
from tests.end_to_end.conftest import clips

pytestmark = pytest.mark.ray
EXTERNAL_CLIPS = 60


def test_a_run_starts_with_another_corpus_and_the_refiner_keeps_its_rows_right(
    config_file: Path, tones: Path, tmp_path: Path
):
    first, bank = tmp_path / "runs" / "tones", tmp_path / "bank"
    done = ask_dist("train", config_file, "optimization.epochs=8")
    assert done.returncode == 0, done.stderr
    write_shards(clips("other", EXTERNAL_CLIPS, seed=7), tmp_path / "other", "train", clips_per_shard=20)
    done = ask_dist("bank", "build", tmp_path / "other", bank, "--checkpoint", first)
    assert done.returncode == 0, done.stderr

    given = ["name=second", f"model.from={first}", f"bank.from={bank}", "optimization.log_every=5"]
    refused = ask_dist("train", config_file, *given, "model.embedding_dim=32")
    assert refused.returncode == 2
    assert "model.embedding_dim is 32" in refused.stderr
    assert not (tmp_path / "runs" / "second").exists()

    lively = ["refine.interval=0", "refine.cpu_share=1", "optimization.epochs=80", "optimization.evaluate_every=40"]
    leaking = [f"data.train=[{tones / 'train'},{tones / 'validation'}]", "data.max_bad_share=0.5"]
    done = ask_dist("train", config_file, *given, *leaking, *lively)
    assert done.returncode == 0, done.stderr
    second = tmp_path / "runs" / "second"
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    told: dict[str, float] = {}
    for row in rows:
        told |= row
    assert told["bank/external_rows"] == EXTERNAL_CLIPS
    assert 0 < told["bank/external_share"] < 1
    assert told["bank/rows"] == 160 + EXTERNAL_CLIPS  # and none of the validation clips that lie in training shards
    assert told["refine/failures"] == 0
    # Measured on rows that were set aside, from the first frame to now.
    assert told["refine/external_stale"] >= EXTERNAL_CLIPS
    assert told["refine/external_drift_after_text"] < told["refine/external_drift_before_text"]
    trained = next(row["train/loss"] for row in rows if "train/loss" in row)
    untrained = json.loads((first / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    assert trained < untrained  # it went on from there
