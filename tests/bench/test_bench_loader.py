from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ask_dist.bench.loader import loader_vs_open_clip, loader_vs_webdataset, start_of_epoch
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """40 clips of noise in three shards."""
    rng = np.random.default_rng(0)
    noise = (rng.uniform(-0.5, 0.5, 800).astype(np.float32) for _ in range(40))
    clips = (Clip(f"c{number}", audio, 8000, ("noise",)) for number, audio in enumerate(noise))
    write_shards(clips, tmp_path, "train", clips_per_shard=15)
    return tmp_path


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_the_benchmark_reads_with_both_and_compares(shards: Path, processes: int) -> None:
    figures = loader_vs_webdataset(shards, rounds=1, processes=processes)
    assert min(figures.values()) > 0
    assert figures["ratio"] == pytest.approx(figures["loader"] / figures["webdataset"])


def test_open_clip_is_measured_where_it_is_installed_and_named_where_not(shards: Path) -> None:
    figures = loader_vs_open_clip(shards, rounds=1)
    if importlib.util.find_spec("open_clip_train") is None:
        assert figures == {"missing": figures["missing"]}
        assert "open_clip_train" in figures["missing"]
    else:
        assert figures["ratio"] == pytest.approx(figures["loader"] / figures["open_clip"])


def test_the_start_of_an_epoch_is_measured() -> None:
    figures = start_of_epoch(shards=300)
    assert figures["shards"] == 300
    assert figures["seconds"] > 0
    assert 0 <= figures["mebibytes"] < 100
