"""Pretrained towers under the engine: they learn, a frozen one stays, and a checkpoint has both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ask_dist import config as configuration
from ask_dist.config import BatchLoss
from ask_dist.losses.objective import AskObjective
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train.engine import Engine
from tests.models.conftest import needs_pretrained
from tests.models.test_clap import CAPTIONS, RATE, sounds
from tests.models.towers import save_clap
from tests.ranks import run_ranks

STEPS = 12


def make_engine(folder: str, stage: int, freeze: bool, loss: BatchLoss, precision: str) -> tuple[Engine, AskObjective]:
    tree = {
        "name": "clap",
        "data": {"train": "x", "sample_rate": RATE, "lanes": 2},
        "model": {
            "embedding_dim": 12,
            "projection": "none",
            "audio": {"name": "clap-htsat", "source": folder, "freeze": freeze},
            "text": {"name": "clap-text", "source": folder, "max_tokens": 16},
        },
        "optimization": {
            "zero_stage": stage,
            "precision": precision,
            "learning_rate": 3e-3,
            "micro_batch_size": 2,
            "loss": loss,
        },
        "knowledge": {"enabled": False},
    }
    config = configuration.parse(tree)
    torch.manual_seed(0)
    model = build_dual_encoder(config.model, RATE, Vocabulary.train(CAPTIONS, 300))
    engine = Engine(model, config.optimization, STEPS, torch.device("cpu"))
    return engine, AskObjective(config.knowledge, half_life=1.0, loss=loss)


def train(folder: str, stage: int, freeze: bool, loss: BatchLoss, precision: str) -> dict[str, Any]:
    engine, objective = make_engine(folder, stage, freeze, loss, precision)
    before = engine.state()
    rank, losses = dist.get_rank(), []
    engine.module.train()
    for _ in range(STEPS):
        mine = slice(2 * rank, 2 * rank + 2)
        features = engine(sounds(2.0, 4)[mine], engine.module.text.tokenize([*CAPTIONS, "viola"][mine]))
        value = objective(*features, torch.arange(4)[mine]).loss
        everywhere = value.detach().clone()
        dist.all_reduce(everywhere)
        losses.append(float(everywhere) / dist.get_world_size())
        engine.backward(value)
        engine.step()
    state = engine.state()
    fresh, _ = make_engine(folder, stage, freeze, loss, precision)
    fresh.load_state(state)
    whole = fresh.whole().eval()
    with torch.no_grad():
        embedded = whole.encode_audio(sounds(2.0, 4))
        wanted = engine.whole().eval().encode_audio(sounds(2.0, 4))
    moved = [name for name in before if name.startswith("model.") and not torch.equal(before[name], state[name])]
    return {"losses": losses, "moved": moved, "restored": embedded, "wanted": wanted}


def every_way(rank: int, folder: str) -> list[dict[str, Any]]:
    """One start of the processes for all tests."""
    ways = ((1, True, "info_nce", "fp32"), (3, False, "siglip", "fp32"), (2, False, "info_nce", "bf16"))
    return [train(folder, *way) for way in ways]


@pytest.fixture(scope="module")
def ways(tmp_path_factory) -> list[dict[str, Any]]:
    needs_pretrained()
    folder = save_clap(tmp_path_factory.mktemp("clap") / "folder")
    return run_ranks(every_way, 2, tmp_path_factory.mktemp("ranks"), str(folder))[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize("way", [0, 1, 2])
def test_the_loss_falls_and_a_checkpoint_gives_the_same_embeddings(ways, way):
    assert ways[way]["losses"][-1] < 0.7 * ways[way]["losses"][0]
    torch.testing.assert_close(ways[way]["restored"], ways[way]["wanted"], atol=1e-6, rtol=0)


@pytest.mark.multiprocess
def test_a_frozen_tower_moves_no_weight(ways):
    moved = ways[0]["moved"]
    assert moved
    assert not [name for name in moved if name.startswith("model.audio.")]
    assert [name for name in ways[1]["moved"] if name.startswith("model.audio.")]


@pytest.mark.multiprocess
def test_the_sigmoid_loss_alone_has_a_bias_and_it_learns(ways):
    assert ["model.logit_bias" in way["moved"] for way in ways] == [False, True, False]
