from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ask_dist.bench.loader import loader_vs_webdataset, start_of_epoch
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip


def test_the_benchmark_reads_with_both_and_compares(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = (rng.uniform(-0.5, 0.5, 800).astype(np.float32) for _ in range(40))
    clips = (Clip(f"c{number}", audio, 8000, ("noise",)) for number, audio in enumerate(noise))
    write_shards(clips, tmp_path, "train", clips_per_shard=15)
    figures = loader_vs_webdataset(tmp_path, rounds=1)
    assert min(figures.values()) > 0
    assert figures["ratio"] == pytest.approx(figures["loader"] / figures["webdataset"])


def test_the_start_of_an_epoch_is_measured() -> None:
    figures = start_of_epoch(shards=300)
    assert figures["shards"] == 300
    assert figures["seconds"] > 0
    assert 0 <= figures["mebibytes"] < 100
