"""Whole runs on a GPU: the worker and the bank's search share one."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import pytest
import torch

from tests.end_to_end.command import ask_dist

pytestmark = [
    pytest.mark.ray,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
ALONE = ("cluster.num_workers=1", "optimization.micro_batch_size=32", "optimization.epochs=20")


def train(config_file: Path, *overrides: str) -> tuple[dict, list[dict[str, float]]]:
    """A run's report and the rows of its metrics."""
    done = ask_dist("train", config_file, *ALONE, *overrides)
    assert done.returncode == 0, done.stderr
    run = config_file.parent / "runs" / "tones"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "report.json").read_text()), [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_run_learns_in_every_precision(config_file: Path, precision: str, zero_stage: int) -> None:
    settings = (f"optimization.precision={precision}", f"optimization.zero_stage={zero_stage}")
    report, rows = train(config_file, *settings)
    assert report["text_to_audio"]["R@10"] > 50.0  # chance is 25
    assert rows[-1]["train/loss"] < 0.8 * rows[0]["train/loss"]
    assert all(row["memory/allocated_gib"] > 0 for row in rows)
    assert all(row["time/forward"] > 0 for row in rows)


def test_chunks_have_the_gradients_of_the_whole_batch(config_file: Path) -> None:
    alike = ("knowledge.enabled=false", "model.dropout=0", "optimization.max_steps=10", "optimization.log_every=1")
    _, whole = train(config_file, *alike)
    chunks = ("optimization.micro_batch_size=8", "optimization.train_batch_size=32", "--overwrite")
    _, chunked = train(config_file, *alike, *chunks)
    for name in ("train/loss", "train/gradient_norm"):
        wanted = [row[name] for row in whole]
        assert [row[name] for row in chunked] == pytest.approx(wanted, rel=5e-2)  # convolutions round to TF32
        assert chunked[0][name] == pytest.approx(wanted[0], rel=1e-3)


def test_a_bank_searches_beside_the_worker_on_its_gpu(config_file: Path) -> None:
    if faiss.get_num_gpus() == 0:
        pytest.skip("FAISS sees no GPU")
    report, rows = train(config_file, "cluster.gpus_per_worker=0.75", "cluster.bank_gpus=0.25")
    assert report["bank"]["rows"] == 160
    assert rows[-1]["bank/failed"] == 0
    assert any(row.get("train/knowledge_used") for row in rows)
