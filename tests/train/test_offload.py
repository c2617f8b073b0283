"""Optimizer and weights in the host's memory, in real gloo processes: what is learned, saved and skipped stays equal.

On a CPU the host is the device: DeepSpeed takes the same ways, without copies between two memories.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ask_dist.train.engine import Engine
from tests.ranks import run_ranks
from tests.train.test_fine_tuning import STEPS, averaged, batch, loss_of, make_engine, train

WAYS = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
SAVED = 3  # steps; the text encoder thaws after the fifth, and is frozen again by a state of before


def run_of(engine: Engine, rank: int) -> dict[str, Any]:
    """A run with clipping, an average of the weights and a tower that thaws; saved, disturbed, and gone on with."""
    found: dict[str, Any] = {"losses": train(engine, SAVED), "state": engine.state()}
    loss = loss_of(engine(*(x[2 * rank :][:2] for x in batch(engine.module, 0))))
    engine.backward(loss * (math.nan if rank == 1 else 1.0))
    found["broken"], found["after broken"] = engine.step().updated, engine.state()
    found["then"] = train(engine, SAVED + 4)
    engine.load_state(found["state"])
    found["losses"] += train(engine, STEPS)
    found["whole"], found["after"] = averaged(engine), engine.state()
    engine.load_state(found["state"])
    return found | {"again": train(engine, STEPS), "after again": engine.state()}


def every_way(rank: int, precision: str) -> dict[str, Any]:
    """One start of the processes for a precision's tests; ZeRO 3 last, after which linear layers round otherwise."""
    return {
        f"{stage} {offload}": run_of(make_engine(stage, precision=precision, offload=offload), rank)
        for stage, offload in sorted([*WAYS, *((stage, "none") for stage in (1, 2, 3))])
    }


@pytest.fixture(scope="module", params=["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(every_way, 2, tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("stage", "offload"), WAYS)
def test_offload_changes_nothing_that_is_learned(ranks, stage, offload):
    for rank in ranks:
        wanted, found = rank[f"{stage} none"], rank[f"{stage} {offload}"]
        for losses in ("losses", "then"):
            assert found[losses] == pytest.approx(wanted[losses], abs=1e-5)
        for part in ("whole", "after"):
            assert set(found[part]) == set(wanted[part])
            for name, tensor in wanted[part].items():
                torch.testing.assert_close(found[part][name], tensor, atol=1e-5, rtol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("stage", "offload"), WAYS)
def test_a_run_with_offload_goes_on_exactly(ranks, stage, offload):
    for rank in ranks:
        run = rank[f"{stage} {offload}"]
        assert run["again"] == run["losses"][SAVED:]
        assert not torch.equal(
            run["state"]["exp_avg.text.embedding.weight"], run["after"]["exp_avg.text.embedding.weight"]
        )
        for name, tensor in run["after"].items():
            torch.testing.assert_close(run["after again"][name], tensor, atol=0, rtol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("stage", "offload"), WAYS)
def test_with_offload_a_gradient_that_is_not_finite_is_left_out_on_all_ranks(ranks, stage, offload):
    for rank in ranks:
        run = rank[f"{stage} {offload}"]
        assert not run["broken"]
        moved = {name for name, tensor in run["state"].items() if not tensor.equal(run["after broken"][name])}
        assert moved - {"loss_scale", "loss_scale.steps"} == {"global_step"}
