"""Runs that start from another run's weights and from a bank that these encoded, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ask_dist.bank.durable import recover
from ask_dist.bank.messages import EXTERNAL
from ask_dist.bank.shard import KnowledgeShard
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import ShardList
from ask_dist.evaluate.encode import encode, paired_rows
from ask_dist.models.saved import load_model
from tests.end_to_end.command import ask_dist
from tests.end_to_end.conftest import PITCHES, SHAPES, clips, configuration

pytestmark = pytest.mark.ray
EXTERNAL_CLIPS = 60


@pytest.fixture(scope="module")
def folder(finished: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tones.yaml`, another corpus `other`, and `bank` of it by the finished run."""
    folder = tmp_path_factory.mktemp("external")
    (folder / "tones.yaml").write_text(yaml.safe_dump(configuration(tones, folder / "runs")))
    write_shards(clips("other", EXTERNAL_CLIPS, seed=7), folder / "other", "train", clips_per_shard=20)
    done = ask_dist("bank", "build", folder / "other", folder / "bank", "--checkpoint", finished)
    assert done.returncode == 0, done.stderr
    return folder


def start_from(finished: Path, folder: Path, name: str) -> list[str]:
    """Overrides of a run that goes on from the finished one, with the other corpus."""
    return [f"name={name}", f"model.from={finished}", f"bank.from={folder / 'bank'}"]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(420)
def test_a_run_starts_with_another_corpus_and_the_refiner_keeps_its_rows_right(
    finished: Path, folder: Path, tones: Path
):
    config_file, given = folder / "tones.yaml", [*start_from(finished, folder, "second"), "optimization.log_every=5"]
    refused = ask_dist("train", config_file, *given, "model.embedding_dim=32")
    assert refused.returncode == 2
    assert "model.embedding_dim is 32" in refused.stderr
    second = folder / "runs" / "second"
    assert not second.exists()

    lively = ["refine.interval=0", "refine.cpu_share=1", "optimization.epochs=50", "optimization.evaluate_every=40"]
    leaking = [f"data.train=[{tones / 'train'},{tones / 'validation'}]", "data.max_bad_share=0.5"]
    done = ask_dist("train", config_file, *given, *leaking, *lively)
    assert done.returncode == 0, done.stderr
    rows = metrics(second)
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
    untrained = metrics(finished)[0]["train/loss"]
    assert trained < untrained  # it went on from there


def test_workers_encode_the_other_corpus_again_into_a_bank_of_two_shards(finished: Path, folder: Path):
    again = ["refine.strategy=reencode", f"refine.corpus={folder / 'other'}", "refine.every=1"]
    kept = ["bank.shards=2", "bank.durable=true", "bank.dtype=float16"]
    done = ask_dist(
        "train", folder / "tones.yaml", *start_from(finished, folder, "third"), *again, *kept, "optimization.epochs=4"
    )
    assert done.returncode == 0, done.stderr
    third = folder / "runs" / "third"
    config, model = load_model(third)
    ids, audio, text = paired_rows(encode(model, ShardList.load(folder / "other"), config, 0, 1))
    found: dict[int, tuple[int, np.ndarray]] = {}
    for shard in ("0", "1"):
        bank = recover(
            third / "bank" / shard, lambda state: KnowledgeShard.from_state(state, dim=64, capacity=500)
        ).bank
        held = bank.snapshot()
        assert EXTERNAL not in held.step
        assert 0 < np.isin(held.ids, ids).sum() < EXTERNAL_CLIPS
        halves = np.concatenate([held.audio, held.text], axis=1)
        found |= {
            row: (step, pair) for row, step, pair in zip(held.ids.tolist(), held.step.tolist(), halves, strict=True)
        }
    last = metrics(third)[-1]["step"]
    for row, wanted in zip(ids.tolist(), np.concatenate([audio, text], axis=1), strict=True):
        step, pair = found[row]
        assert step == last  # an interval ends with the run: these weights are the run's last
        np.testing.assert_allclose(pair, wanted, atol=5e-3)
    assert any("time/reencode" in row for row in metrics(third))


def test_a_run_trains_with_a_bank_of_captions_alone(finished: Path, tones: Path, tmp_path: Path):
    made = [
        f"{shape} and {pitch}, a {kind}" for kind in ("sound", "note", "tone") for pitch in PITCHES for shape in SHAPES
    ]
    tested = "low and steady"  # that the finished run is tested on
    (tmp_path / "captions.txt").write_text("\n".join([*made, tested]))
    built = ask_dist("bank", "build", tmp_path / "captions.txt", tmp_path / "bank", "--checkpoint", finished)
    assert built.returncode == 0, built.stderr
    assert f"{len(made)} rows in " in built.stdout
    assert "1 of them because they are held out" in built.stdout

    config_file, run = tmp_path / "tones.yaml", tmp_path / "runs" / "fourth"
    config_file.write_text(yaml.safe_dump(configuration(tones, tmp_path / "runs")))
    short = ["optimization.epochs=4", "optimization.log_every=1", "knowledge.start=0", "bank.durable=true"]
    done = ask_dist("train", config_file, *start_from(finished, tmp_path, "fourth"), *short)
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(run) if "train/loss" in row]
    assert len(rows) == 20
    assert all(row["train/loss"] is not None and row["train/skipped_steps"] == 0 for row in rows)  # null: not finite
    assert sum(row["train/knowledge_used"] for row in rows) > 0
    told = json.loads((run / "report.json").read_text())["bank"]
    assert (told["rows"], told["external_rows"]) == (160 + len(made), len(made))
    assert 0 < told["external_share"] < 1
    held = recover(
        run / "bank" / "0", lambda state: KnowledgeShard.from_state(state, dim=64, capacity=500)
    ).bank.snapshot()
    np.testing.assert_array_equal(held.audio.any(axis=1), held.step != EXTERNAL)  # captions got no audio meanwhile
    assert held.text.any(axis=1).all()
