"""Tiny corpora."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip, ShardList

RATE = 8000


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    """Makes a clip of noise of its own, with one to three captions, out of its number."""

    def make(number: int, samples: int = 400) -> Clip:
        audio = np.random.default_rng(number).uniform(-0.5, 0.5, samples).astype(np.float32)
        captions = tuple(f"caption {number} {letter}" for letter in "abc"[: 1 + number % 3])
        return Clip(f"clip-{number:03d}", audio, RATE, captions, (f"class {number % 4}",), {"swapped": number % 5 == 0})

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_clip: Callable[..., Clip]) -> Path:
    """103 clips in eleven shards, the last one with three."""
    folder = tmp_path_factory.mktemp("corpus") / "train"
    write_shards(map(make_clip, range(103)), folder, "train", clips_per_shard=10)
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path) -> ShardList:
    """The list of the corpus."""
    return ShardList.load(corpus)
