"""DeepSpeed behind the engine, in real gloo processes: exact continuation on every ZeRO stage."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ask_dist.config import Optimization
from ask_dist.train.engine import Engine, learning_rate
from tests.ranks import run_ranks

GLOBAL_BATCH, TOTAL_STEPS, BEFORE, AFTER = 8, 20, 5, 4


class Network(nn.Module):
    """All that a model may have: frozen weights, a buffer, one element that two ranks can't share evenly, and matrices
    of more than 100,000 elements, which ZeRO 3 really partitions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(320, 320).requires_grad_(False)
        self.layers = nn.Sequential(nn.Linear(320, 401), nn.LayerNorm(401), nn.GELU(), nn.Linear(401, 3))
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("shift", torch.zeros(320))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.frozen(x) + self.shift) * self.log_scale[0].exp()


def make_engine(stage: int) -> Engine:
    micro = GLOBAL_BATCH // dist.get_world_size()
    settings = Optimization(zero_stage=stage, micro_batch_size=micro, gradient_clip=0.5, learning_rate=1e-3)
    return Engine(Network(), settings, TOTAL_STEPS, torch.device("cpu"))


def train(engine: Engine, steps: int) -> list[float]:
    """Global losses of steps on this rank's part of batches that depend on global_step alone."""
    losses = []
    rank, micro = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    for _ in range(steps):
        batch = torch.randn(GLOBAL_BATCH, 320, generator=torch.Generator().manual_seed(engine.global_step))
        loss = (engine(batch[rank * micro : (rank + 1) * micro]) - 1.0).square().mean()
        everywhere = loss.detach().clone()
        dist.all_reduce(everywhere)
        losses.append(float(everywhere) / dist.get_world_size())
        engine.backward(loss)
        engine.step()
    return losses


def continue_from_state(rank: int, stage: int) -> dict[str, Any]:
    engine = make_engine(stage)
    engine.module.shift.fill_(0.25)
    first = train(engine, BEFORE)
    engine.skip()  # a step that was left out counts for the data, not for Adam
    state = engine.state()
    uninterrupted = train(engine, AFTER)
    fresh = make_engine(stage)
    unrestored = train(fresh, BEFORE)
    fresh.load_state(state)
    return {
        "bucket": getattr(engine.deepspeed.optimizer, "reduce_bucket_size", 0),
        "first": first,
        "uninterrupted": uninterrupted,
        "continued": train(fresh, AFTER),
        "other start": unrestored,
        "state": state,
        "after": engine.state(),
        "after continued": fresh.state(),
        "whole": evaluate_whole(fresh, rank),
    }


def evaluate_whole(engine: Engine, rank: int) -> dict[str, Tensor]:
    """Weights of `whole` after an evaluation in which the second rank has more batches than the first."""
    model = engine.whole().eval()
    with torch.no_grad():
        for _ in range(1 + 2 * rank):
            model(torch.ones(2, 320))
    model.train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def step_with_a_broken_gradient(rank: int, stage: int) -> dict[str, Any]:
    """One rank has a gradient that is not a number, between steps that have none."""
    engine = make_engine(stage)
    train(engine, 2)
    before = engine.state()
    loss = (engine(torch.ones(2, 320)) - 1.0).square().mean()
    engine.backward(loss * (math.nan if rank == 1 else 1.0))
    result = engine.step()
    after = engine.state()
    untouched = make_engine(stage)
    train(untouched, 2)
    untouched.skip()
    return {
        "updated": result.updated,
        "norm": result.gradient_norm,
        "moved": [name for name in before if name != "global_step" and not torch.equal(before[name], after[name])],
        "step": int(after["global_step"]) - int(before["global_step"]),
        "then": train(engine, 2),
        "wanted": train(untouched, 2),
    }


def all_stages(rank: int) -> dict[int | str, Any]:
    """One start of the processes for all tests: it costs more than the tests themselves."""
    stages: dict[int | str, Any] = {stage: continue_from_state(rank, stage) for stage in (0, 1, 2, 3)}
    broken = {stage: step_with_a_broken_gradient(rank, stage) for stage in (0, 1, 2, 3)}
    return stages | {"disturbed": evaluate_between_steps(rank), "broken": broken}


def continue_elsewhere(rank: int, state: dict[str, Tensor]) -> list[float]:
    engine = make_engine(stage=1)
    engine.load_state(state)
    return train(engine, AFTER)


def evaluate_between_steps(rank: int) -> list[list[float]]:
    """Losses without and with an evaluation and a skipped forward pass in between, under ZeRO 3."""
    results = []
    for disturb in (False, True):
        engine = make_engine(stage=3)
        losses = train(engine, 2)
        if disturb:
            engine.module.eval()
            with torch.no_grad():
                engine.module.layers(torch.zeros(2, 320))
            engine.module.train()
            engine(torch.zeros(2, 320))
        engine.skip()
        results.append(losses + train(engine, 2))
    return results


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> list[dict[int | str, Any]]:
    """`all_stages` of two ranks."""
    return run_ranks(all_stages, 2, tmp_path_factory.mktemp("stages"))


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_fresh_engine_continues_from_state_as_if_nothing_had_happened(stages, stage):
    for rank in stages:
        run = rank[stage]
        assert run["continued"] == pytest.approx(run["uninterrupted"], abs=1e-6)
        assert run["first"][0] != pytest.approx(run["uninterrupted"][0], abs=1e-2)  # it had learned something to lose
        for name, tensor in run["after"].items():
            torch.testing.assert_close(run["after continued"][name], tensor, atol=1e-6, rtol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_can_evaluate_and_export_the_whole_model_on_its_own(stages, stage):
    for rank in stages:
        run = rank[stage]
        assert set(run["whole"]) == set(Network().state_dict())
        for name, tensor in run["whole"].items():
            kind = "buffer" if name == "shift" else "model"
            torch.testing.assert_close(tensor, run["after continued"][f"{kind}.{name}"], atol=0, rtol=0)


@pytest.mark.multiprocess
def test_every_stage_trains_alike(stages):
    for one, other in itertools.pairwise(stages[0][stage] for stage in (0, 1, 2, 3)):
        assert one["first"] + one["uninterrupted"] == pytest.approx(other["first"] + other["uninterrupted"], abs=1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_is_whole_fp32_and_the_same_on_every_rank(stages, stage):
    first, second = (rank[stage]["state"] for rank in stages)
    wanted = dict(Network().named_parameters())
    trained = {name for name, parameter in wanted.items() if parameter.requires_grad}
    assert {name.removeprefix("model.") for name in first if name.startswith("model.")} == set(wanted)
    assert {name.removeprefix("exp_avg.") for name in first if name.startswith("exp_avg.")} == trained
    assert {name.removeprefix("exp_avg_sq.") for name in first if name.startswith("exp_avg_sq.")} == trained
    for name, parameter in wanted.items():
        assert first[f"model.{name}"].shape == parameter.shape
        assert first[f"model.{name}"].dtype == torch.float32
    for name in trained:
        assert first[f"exp_avg_sq.{name}"].abs().sum() > 0
    torch.testing.assert_close(first["model.frozen.weight"], wanted["frozen.weight"].detach())
    assert (first["buffer.shift"] == 0.25).all()
    assert (int(first["global_step"]), int(first["updates"])) == (BEFORE + 1, BEFORE)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=0, rtol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_buffer_is_larger_than_all_gradients(stages, stage):
    trained = sum(weights.numel() for weights in Network().parameters() if weights.requires_grad)
    assert {rank[stage]["bucket"] for rank in stages} == {trained}


@pytest.mark.multiprocess
def test_zero_2_on_two_ranks_continues_as_zero_1_on_one(stages, tmp_path):
    run = stages[0][2]
    (continued,) = run_ranks(continue_elsewhere, 1, tmp_path, run["state"])
    assert continued == pytest.approx(run["uninterrupted"], abs=1e-4)
    assert continued != pytest.approx(run["first"][:AFTER], abs=1e-2)


@pytest.mark.multiprocess
def test_zero_3_bears_an_evaluation_and_a_skipped_step(stages):
    for rank in stages:
        undisturbed, disturbed = rank["disturbed"]
        assert disturbed == pytest.approx(undisturbed, abs=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth():
    settings = Optimization(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1.0
    assert learning_rate(settings, 55, 100) == pytest.approx((1.0 + 0.01) / 2)  # half of the cosine
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert learning_rate(settings, 100, 100) == pytest.approx(0.01)
    assert learning_rate(settings, 1000, 100) == pytest.approx(0.01)


@pytest.mark.parametrize("warmup_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_the_learning_rate_is_positive_on_short_runs(warmup_share, total):
    settings = Optimization(learning_rate=1.0, warmup_share=warmup_share)
    assert all(0.0 < learning_rate(settings, step, total) <= 1.0 for step in range(total + 1))


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_on_all(stages, stage):
    for rank in stages:
        found = rank["broken"][stage]
        assert not found["updated"]
        assert math.isinf(found["norm"])
        assert found["moved"] == []
        assert found["step"] == 1
        assert found["then"] == found["wanted"]
