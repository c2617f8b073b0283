"""The logit_scale at its cap under the engine, in real gloo processes: it stays there, and comes back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ask_dist.config import AudioModel, Model, Optimization, TextModel
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train.engine import Engine, learning_rate
from tests.ranks import run_ranks

WORDS = ["a dog", "rain falls", "viola", "drum"]
LARGEST, UP, STEPS, TOTAL_STEPS = 15.0, 6, 16, 200
SETTINGS = {"learning_rate": 0.1, "weight_decay": 0.0, "warmup_share": 0.0}


def make_model() -> DualEncoder:
    torch.manual_seed(0)
    audio, text = AudioModel(width=8, mel_bins=16), TextModel(width=160, heads=2, max_tokens=8)
    config = Model(embedding_dim=12, dropout=0.0, audio=audio, text=text, logit_scale_max=LARGEST)
    return build_dual_encoder(config, 8000, Vocabulary.train(WORDS, 280)).train()


def loss_of(model: Any, tokenize: Any, step: int, mine: slice) -> tuple[Tensor, float]:
    """A loss that drives the logit_scale up, then down, to which a rank's part of a batch adds little; the scale."""
    audio = torch.randn(4, 1600, generator=torch.Generator().manual_seed(step))
    features = model(audio[mine], tokenize(WORDS)[mine])
    cosines = (features.audio_features * features.text_features).sum(dim=1)
    loss = (0.01 * cosines + (-1.0 if step < UP else 1.0) * features.logit_scale).mean()
    return loss, float(features.logit_scale)


def driven(rank: int) -> dict[str, Any]:
    """The scales that the forward passes of each stage had, and what the optimizer held after each step."""
    runs: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        optimization = Optimization(zero_stage=stage, micro_batch_size=2, ema_decay=0.5, **SETTINGS)
        engine = Engine(make_model(), optimization, TOTAL_STEPS, torch.device("cpu"))
        scales, masters = [], []
        for step in range(STEPS):
            loss, scale = loss_of(engine, engine.module.text.tokenize, step, slice(2 * rank, 2 * rank + 2))
            scales.append(scale)
            engine.backward(loss)
            engine.step()
            masters.append(float(engine.state()["model.log_logit_scale"]))
        runs[str(stage)] = {"scales": scales, "masters": masters, "average": float(engine.whole().log_logit_scale)}
        dist.barrier()
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(driven, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], float]:
    """The same in plain torch: the parameter after each step, clamped, and its average."""
    model, schedule = make_model(), Optimization(**SETTINGS)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    masters, average = [], model.log_logit_scale.detach().clone()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, model.text.tokenize, step, slice(None))[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, step, TOTAL_STEPS)
        optimizer.step()
        with torch.no_grad():
            masters.append(float(model.log_logit_scale.clamp_(max=math.log(LARGEST))))
            average.lerp_(model.log_logit_scale, 0.5)
    return masters, float(average)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_at_its_cap_it_stays_and_from_there_it_comes_back(runs, reference, stage):
    masters, average = reference
    for rank in runs:
        run = rank[str(stage)]
        assert max(run["masters"]) == pytest.approx(math.log(LARGEST), abs=1e-6)
        assert run["masters"][UP - 1] == pytest.approx(math.log(LARGEST), abs=1e-6)
        assert run["scales"][-1] < 0.9 * LARGEST
        assert run["masters"] == pytest.approx(masters, abs=1e-4)
        assert run["scales"][1:] == pytest.approx([math.exp(value) for value in masters[:-1]], rel=1e-4)
        assert run["average"] == pytest.approx(average, abs=1e-4)
