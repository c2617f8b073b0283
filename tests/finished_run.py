"""A corpus of noise, and what a finished run on it leaves of its model, without the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.data.captions import captions
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip, ShardList
from ask_dist.files import write_atomically
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.saved import save_model
from ask_dist.models.text import Vocabulary

RATE = 16000


def noise_corpus(folder: Path, clips: int) -> Path:
    rng = np.random.default_rng(0)
    sounds = [
        Clip(
            key=f"clip-{number:02d}",
            audio=rng.normal(scale=0.1, size=RATE // 2).astype(np.float32),
            sample_rate=RATE,
            captions=(f"noise number {number}", f"the\u2028noise {number}")[: 1 + number % 2],
            classes=(),
        )
        for number in range(clips)
    ]
    write_shards(sounds, folder, "train", clips_per_shard=10)
    return folder


def untrained_run(folder: Path, corpus: Path, seed: int = 0, **optimization: object) -> Path:
    tree = {
        "name": "noise",
        "data": {"train": str(corpus), "clip_seconds": 0.5},
        "model": {"embedding_dim": 32, "audio": {"width": 8}, "text": {"width": 32, "heads": 2}},
        "optimization": {"micro_batch_size": 8, **optimization},
    }
    config: Config = configuration.parse(tree)
    torch.manual_seed(seed)
    vocabulary = Vocabulary.train(captions(ShardList.load(corpus), 1000), config.model.text.vocabulary)
    save_model(folder / "model", build_dual_encoder(config.model, config.data.sample_rate, vocabulary))
    write_atomically(folder / "config.yaml", configuration.dump(config).encode())
    return folder
