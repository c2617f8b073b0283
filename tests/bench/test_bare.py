"""Loops of plain PyTorch: whatever they spare, they train the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ask_dist import config as configuration
from ask_dist.bench.bare import bare_loop
from ask_dist.data.pack import write_shards
from tests.end_to_end.conftest import clips
from tests.end_to_end.conftest import configuration as tree

CHUNKS = {"micro_batch_size": 4, "train_batch_size": 16}
ALIKE = {
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "chunks": CHUNKS,
    "chunks and ZeRO 1": {"zero_stage": 1, **CHUNKS},
    "activation checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.multiprocess
@pytest.mark.slow
def test_loops_that_spare_memory_lose_as_the_plain_one(tmp_path: Path) -> None:
    write_shards(clips("train", 80, 0), tmp_path / "train", "train", clips_per_shard=20)
    settings: dict[str, Any] = tree(tmp_path, tmp_path / "runs")
    settings["data"] |= {"validation": None, "test": None}
    settings["model"] |= {"dropout": 0.0}  # chunks draw it otherwise
    settings["optimization"] |= {"micro_batch_size": 8, "max_steps": 8}
    first = {**settings["optimization"], "max_steps": 1}
    start = bare_loop(configuration.parse(settings | {"optimization": first}), 1)
    plain = bare_loop(configuration.parse(settings), 2)
    assert len(plain.rates) == 4
    assert abs(plain.loss - start.loss) > 1e-2
    for name, further in ALIKE.items():
        config = configuration.parse(settings | {"optimization": settings["optimization"] | further})
        assert bare_loop(config, 2, alike=True).loss == pytest.approx(plain.loss, abs=1e-4), name
