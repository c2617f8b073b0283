"""Fine-tuning under the engine, in real gloo processes: equal to plain torch, and exact when a run goes on."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ask_dist.config import AudioModel, Lora, Model, Optimization, TextModel
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.lora import add_adapters
from ask_dist.models.text import Vocabulary
from ask_dist.train.engine import Engine, learning_rate
from tests.models.conftest import needs_pretrained
from tests.ranks import run_ranks

BATCH, STEPS, HELD, EMA, LAYER_DECAY = 4, 10, 5, 0.8, 0.5
STAGES = (0, 1, 2, 3)
WORDS = ["a", "dog", "rain", "falls", "viola", "drum"]
OPTIMIZATION = {
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "gradient_clip": 0.5,
    "layer_decay": LAYER_DECAY,
    "ema_decay": EMA,
    "activation_checkpointing": True,
}


def settings(dropout: float, lora: bool) -> Model:
    """A text encoder with matrices of more than 100,000 elements, which ZeRO 3 really partitions."""
    size = {"width": 160, "layers": 2, "heads": 2, "max_tokens": 8}
    learns = {"lora": Lora(rank=4, targets=("linear1", "linear2"))} if lora else {"freeze": True, "unfreeze_at": 0.5}
    return Model(
        embedding_dim=12, dropout=dropout, audio=AudioModel(width=8, mel_bins=16), text=TextModel(**size, **learns)
    )


def make_model(dropout: float = 0.0, lora: bool = False) -> DualEncoder:
    torch.manual_seed(0)
    config = settings(dropout, lora)
    model = build_dual_encoder(config, 8000, Vocabulary.train(WORDS, 280))
    add_adapters(model, config)
    return model.train()


def make_engine(stage: int, dropout: float = 0.0, lora: bool = False, **memory: str) -> Engine:
    micro = BATCH // dist.get_world_size()
    optimization = Optimization(zero_stage=stage, micro_batch_size=micro, **OPTIMIZATION, **memory)
    return Engine(make_model(dropout, lora), optimization, STEPS, torch.device("cpu"))


def batch(model: DualEncoder, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(len(WORDS), (BATCH, 3), generator=generator).tolist()
    captions = [" ".join(WORDS[word] for word in row) for row in words]
    return torch.randn(BATCH, 1600, generator=generator), model.text.tokenize(captions)


def loss_of(features: Any) -> Tensor:
    cosines = (features.audio_features * features.text_features).sum(dim=1)
    return (cosines * features.logit_scale / 10.0 - 1.0).square().mean()


def train(engine: Engine, until: int) -> list[float]:
    """Global losses of steps on this rank's part of batches that depend on global_step alone."""
    losses, rank = [], dist.get_rank()
    micro = BATCH // dist.get_world_size()
    while engine.global_step < until:
        torch.manual_seed(1000 * engine.global_step + rank)  # dropout is a function of the step, as in the loop
        loss = loss_of(engine(*(x[rank * micro :][:micro] for x in batch(engine.module, engine.global_step))))
        everywhere = loss.detach().clone()
        dist.all_reduce(everywhere)
        losses.append(float(everywhere) / dist.get_world_size())
        engine.backward(loss)
        engine.step()
    return losses


def averaged(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.whole().state_dict().items()}


def continued(rank: int, stage: int, lora: bool) -> dict[str, Any]:
    """A run with dropout, and runs that go on from its states before and after the text encoder thaws."""
    engine = make_engine(stage, dropout=0.2, lora=lora)
    first = engine.state()
    run: dict[str, Any] = {"first": first, "states": {}, "losses": {}, "continued": {}}
    starts = (3, 7)
    for start, end in zip((0, *starts), (*starts, STEPS), strict=True):
        run["losses"][start] = train(engine, end)
        run["states"][end] = engine.state()
    for start in starts:
        other = make_engine(stage, dropout=0.2, lora=lora)
        if start == 3:  # its encoder has thawed already: it freezes again
            train(other, 6)
        other.load_state(run["states"][start])
        run["continued"][start] = train(other, STEPS)
        run["after"] = other.state()
    run["whole"] = averaged(engine)
    return run


def every_way(rank: int) -> dict[str, Any]:
    """One start of the processes for all tests."""
    runs: dict[str, Any] = {}
    for stage in STAGES:
        engine = make_engine(stage)
        losses = train(engine, STEPS)
        runs[f"plain {stage}"] = {"losses": losses, "whole": averaged(engine), "state": engine.state()}
        for lora in (False, True):
            runs[f"{'lora' if lora else 'thaw'} {stage}"] = continued(rank, stage, lora)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    needs_pretrained()
    return run_ranks(every_way, 2, tmp_path_factory.mktemp("ranks"))[0]


def scale_of(name: str) -> float:
    """What the rate of a parameter is multiplied by, told by its name."""
    if name == "text.embedding.weight":
        return LAYER_DECAY**2
    if name.startswith("text.layers.layers.0"):
        return LAYER_DECAY
    if name.startswith("audio.blocks."):
        return LAYER_DECAY ** (3 - int(name.split(".")[2]))
    return 1.0


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], dict[str, Tensor]]:
    """The same run in plain torch: two optimizers, the second of which begins when the text encoder learns."""
    model = make_model()
    model.text.thaws_at, model.text.held = 0.0, False
    schedule = Optimization(**OPTIMIZATION)
    average = copy.deepcopy(dict(model.named_parameters()))
    optimizers: dict[bool, torch.optim.Optimizer] = {}
    losses = []
    for step in range(STEPS):
        for text in (False, True):
            if text not in optimizers and (not text or step >= HELD):
                groups = [
                    {"params": [p], "name": n, "weight_decay": 0.1 if p.ndim >= 2 else 0.0}
                    for n, p in model.named_parameters()
                    if n.startswith("text.") == text
                ]
                optimizers[text] = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
        model.text.requires_grad_(True in optimizers)
        model.zero_grad()
        loss = loss_of(model(*batch(model, step)))
        losses.append(float(loss.detach()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(schedule, step, STEPS) * scale_of(group["name"])
            optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name] = EMA * average[name] + (1.0 - EMA) * parameter
    return losses, {name: tensor.detach() for name, tensor in average.items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_plain_torch_with_an_optimizer_that_begins_when_the_tower_learns(runs, reference, stage):
    losses, average = reference
    assert runs[f"plain {stage}"]["losses"] == pytest.approx(losses, abs=1e-4)
    for name, tensor in average.items():
        torch.testing.assert_close(runs[f"plain {stage}"]["whole"][name], tensor, atol=1e-4, rtol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["thaw", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_exactly_before_and_after_the_tower_thaws(runs, kind, stage):
    run = runs[f"{kind} {stage}"]
    uninterrupted = list(itertools.chain.from_iterable(run["losses"].values()))
    assert run["continued"][3] == pytest.approx(uninterrupted[3:], abs=1e-6)
    assert run["continued"][7] == pytest.approx(uninterrupted[7:], abs=1e-6)
    assert set(run["after"]) == set(run["states"][STEPS])
    for name, tensor in run["states"][STEPS].items():
        torch.testing.assert_close(run["after"][name], tensor, atol=1e-6, rtol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_tower_stays_to_the_bit_until_it_thaws(runs, stage):
    run = runs[f"thaw {stage}"]
    tower = [name for name in run["first"] if name.startswith(("model.text.", "ema.text."))]
    assert len(tower) > 20
    moved = {
        step: {name for name in tower if not torch.equal(run["first"][name], run["states"][step][name])}
        for step in (3, 7)
    }
    assert moved == {3: set(), 7: set(tower)}
    counts = {step: (int(state["updates"]), int(state["updates.text"])) for step, state in run["states"].items()}
    assert counts == {3: (3, 0), 7: (7, 2), STEPS: (STEPS, STEPS - HELD)}


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", STAGES)
def test_of_a_tower_with_adapters_they_alone_learn_and_whole_has_them_merged(runs, stage):
    run = runs[f"lora {stage}"]
    last = run["states"][STEPS]
    moved = {
        name for name, tensor in last.items() if name.startswith("model.text.") and not tensor.equal(run["first"][name])
    }
    assert moved == {name for name in last if name.startswith("model.text.") and ".lora_" in name}
    assert not [name for name in last if name.startswith("exp_avg.text.") and ".lora_" not in name]
    torch.manual_seed(0)
    unadapted = build_dual_encoder(settings(0.0, lora=True), 8000, Vocabulary.train(WORDS, 280))
    assert set(run["whole"]) == set(unadapted.state_dict())
    layer = "text.layers.layers.1.linear1"
    down, up = (last[f"ema.{layer}.lora_{side}.default.weight"] for side in "AB")
    wanted = last[f"model.{layer}.base_layer.weight"] + 16.0 / 4 * up @ down
    torch.testing.assert_close(run["whole"][f"{layer}.weight"], wanted, atol=1e-6, rtol=0)
    assert not torch.equal(wanted, last[f"model.{layer}.base_layer.weight"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["thaw", "lora"])
def test_a_state_of_two_ranks_under_zero_3_goes_on_as_one_rank_under_zero_1(runs, kind, tmp_path):
    states = runs["plain 3"]["state"] if kind == "thaw" else runs["lora 3"]["states"][STEPS]
    (found,) = run_ranks(taken_over, 1, tmp_path, states, kind == "lora")
    assert set(found) == set(states)
    for name, tensor in states.items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)


@pytest.mark.multiprocess
def test_an_average_that_the_checkpoint_lacks_begins_with_its_weights(runs, tmp_path):
    state = {name: tensor for name, tensor in runs["plain 2"]["state"].items() if not name.startswith("ema.")}
    (found,) = run_ranks(taken_over, 1, tmp_path, state, False)
    averages = {name for name in found if name.startswith("ema.")}
    assert averages == set(runs["plain 2"]["state"]) - set(state)
    for name in averages:
        torch.testing.assert_close(found[name], state[name.replace("ema.", "model.", 1)], atol=0, rtol=0)


def taken_over(rank: int, state: dict[str, Tensor], lora: bool) -> dict[str, Tensor]:
    engine = make_engine(stage=1, lora=lora)
    engine.load_state(state)
    return engine.state()
