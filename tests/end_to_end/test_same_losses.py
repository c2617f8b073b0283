"""A run whose global batch is embedded in chunks against the same run at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.command import ask_dist

pytestmark = pytest.mark.ray

# Chunks have dropout of their own, and two workers have neighbours of their own pairs.
COMPARABLE = (
    *("optimization.train_batch_size=32", "optimization.deterministic=true", "optimization.log_every=1"),
    *("model.dropout=0", "cluster.num_workers=1", "refine.strategy=none", "optimization.zero_stage=2"),
)


def test_a_run_in_chunks_has_the_losses_of_one_at_once(config_file: Path, tmp_path: Path) -> None:
    losses = {}
    for name, micro_batch_size in (("once", 32), ("chunks", 12)):
        size = f"optimization.micro_batch_size={micro_batch_size}"
        done = ask_dist("train", config_file, *COMPARABLE, f"name={name}", size, "data.validation=null")
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        steps = [row for row in rows if "train/loss" in row]
        losses[name] = [row["train/loss"] for row in steps]
        assert steps[-1]["train/samples_seen"] == 10 * 160
        assert steps[-1]["train/knowledge_used"] == 1.0
    assert losses["chunks"][:25] == pytest.approx(losses["once"][:25], abs=1e-4)
    # Later a neighbour, one of two that are about as near, may be another.
    assert losses["chunks"] == pytest.approx(losses["once"], abs=1e-2)
    assert losses["once"][-1] < losses["once"][0]
