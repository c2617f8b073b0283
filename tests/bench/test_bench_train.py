from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ask_dist.bench.train import COMPARISONS, Comparison, compare
from ask_dist.config import load
from ask_dist.data.pack import write_shards
from ask_dist.data.samples import read_clips
from ask_dist.data.shards import ShardList
from tests.end_to_end.conftest import clips, configuration


@pytest.mark.ray
def test_a_run_in_chunks_is_compared_with_a_bare_loop_over_the_same_batches(tmp_path: Path) -> None:
    write_shards(clips("train", 80, 0), tmp_path / "train", "train", clips_per_shard=40)
    tree = configuration(tmp_path, tmp_path / "runs")
    tree["data"] |= {"validation": None, "test": None}
    path = tmp_path / "tones.yaml"
    path.write_text(yaml.safe_dump(tree))
    chunks = {"optimization.micro_batch_size": 4, "optimization.train_batch_size": 32}
    found = compare(Comparison(path, {"chunks": chunks}, steps=50, rounds=1))
    bare, alike, case = found["bare"], found["chunks, loop"], found["chunks"]
    assert case["ratio"] == pytest.approx(case["samples_per_second"] / bare["samples_per_second"])
    assert case["memory_ratio"] == pytest.approx(case["peak_gib"] / bare["peak_gib"])
    assert case["alike_ratio"] == pytest.approx(case["samples_per_second"] / alike["samples_per_second"])
    assert case["alike_memory_ratio"] == pytest.approx(case["peak_gib"] / alike["peak_gib"])
    assert min(*(loop["samples_per_second"] for loop in (bare, alike)), bare["peak_gib"], case["ratio"]) > 0
    assert {"data", "forward", "loss", "backward", "step"} <= set(case["stages"])
    assert 0.5 < sum(case["stages"].values()) <= 1.05


@pytest.mark.parametrize("title", COMPARISONS)
def test_every_setting_that_is_compared_is_one_of_a_run(title: str) -> None:
    comparison = COMPARISONS[title]
    for settings in ({}, *comparison.cases.values()):
        overrides = [f"{key}={value}" for key, value in (comparison.shared | settings).items()]
        assert load(comparison.config_file, overrides).name


def test_large_towers_run_on_the_first_clips_of_a_corpus(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_shards(clips(split, 60, 0), tmp_path / split, split)
    tree = configuration(tmp_path, tmp_path / "runs")
    path = tmp_path / "tones.yaml"
    path.write_text(yaml.safe_dump(tree))
    comparison = Comparison(path, {"large": {}}, {"data.lanes": 4}, weights=lambda folder: folder)
    shared = comparison.with_weights(tmp_path / "few").shared
    assert shared["model.audio.source"] == tmp_path / "few" / "weights"
    assert shared["data.lanes"] == 4
    for split in ("train", "test"):
        whole, few = ShardList.load(tmp_path / split), ShardList.load(shared[f"data.{split}"])
        assert [raw.key for shard in range(4) for raw in read_clips(few, shard, 0, 10)] == [
            raw.key for raw in read_clips(whole, 0, 0, 40)
        ]
