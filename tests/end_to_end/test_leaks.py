"""A run whose training clips sound like those that are held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip
from tests.end_to_end.command import ask_dist
from tests.end_to_end.conftest import RATE, configuration

pytestmark = pytest.mark.ray
HELD_OUT = {"test": 5, "held_out": 50}  # the training clip that a split has a cut of


def noise(number: int, seconds: float = 2.0) -> Clip:
    audio = np.random.default_rng(number).normal(scale=0.1, size=round(seconds * RATE)).astype(np.float32)
    return Clip(f"noise-{number}", audio, RATE, (f"noise number {number}",))


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both_workers_refuse_what_sounds_like_a_held_out_clip_and_the_report_counts_it(tmp_path: Path, cached: bool):
    write_shards(map(noise, range(64)), tmp_path / "train", "train", clips_per_shard=16)
    write_shards(map(noise, range(100, 108)), tmp_path / "validation", "validation")
    for split, number in HELD_OUT.items():
        cut = Clip(f"cut-{number}", 0.3 * noise(number).audio[4000:], RATE, (f"cut number {number}",))
        write_shards([cut, *map(noise, range(200, 206))], tmp_path / split, split)
    config = configuration(tmp_path, tmp_path / "runs")
    config["data"] |= {
        "held_out": [str(tmp_path / "held_out")],
        "fingerprints": True,
        "clip_seconds": 2.0,
        "max_bad_share": 0.5,
    }
    config["optimization"] |= {"epochs": 2, "micro_batch_size": 8}
    if cached:
        config["data"] |= {"cache_embeddings": True}
        config["model"] |= {"audio": {"width": 8, "freeze": True}}
        config["model"]["text"] |= {"freeze": True}
    (tmp_path / "noise.yaml").write_text(yaml.safe_dump(config))
    checked = ask_dist("check", tmp_path / "noise.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "sounds are decoded and compared in the run, not here" in checked.stdout
    done = ask_dist("train", tmp_path / "noise.yaml")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tones"
    named = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert {record["key"]: record["reason"] for record in named} == {
        f"noise-{number}": f"held out: it sounds like {split} as cut-{number}" for split, number in HELD_OUT.items()
    }
    report = json.loads((run / "report.json").read_text())
    assert (report["quarantine"]["count"], report["quarantine"]["leaks"]) == (2, 2)
    assert report["bank"]["rows"] == 62
    assert len(list((run.parent / ".embeddings").rglob("*.safetensors"))) == (
        8 if cached else 0
    )  # a tower and shard each
