"""Gathered losses against one process over the whole batch: gradients, for the value alone does not tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from ask_dist.config import BatchLoss, Knowledge, Reliability
from ask_dist.losses.contrastive import info_nce, weighted_mean
from ask_dist.losses.gather import GlobalBatch, gather
from ask_dist.losses.injection import Neighbours
from ask_dist.losses.objective import AskObjective
from tests.allocations import Allocations
from tests.ranks import run_ranks

PAIRS, DIM = 12, 8
LOCAL = 96  # rows of every rank where memory is measured
Features = tuple[Tensor, Tensor, Tensor, Tensor]
KNOWLEDGE = Knowledge(start=0.0, temperature=0.2, reliability=Reliability(start=0.0, rank=4, gamma=2.0))
# The largest and smallest id, and pairs that occur twice; the slots not valid are unequal in number over 2 and 4 ranks.
IDS = torch.tensor([2**63 - 1, -(2**63), 3, 4, 3, 6, 7, 8, 9, 4, 11, 12])
VALID = torch.tensor([True, True, True, True, False, True, True, False, False, True, True, False])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bank_rows(local: slice) -> Neighbours:
    """The same rows for every rank, and the own rows of its part of the batch."""
    rows = [normalize(random(20, DIM, seed=seed), dim=1) for seed in (1, 2)]
    own = [normalize(random(PAIRS, DIM, seed=seed), dim=1)[local] for seed in (8, 9)]
    own += [torch.arange(-1.0, PAIRS - 1.0)[local], torch.linspace(0.4, 1.0, PAIRS)[local]]
    prototypes = [(normalize(random(5, DIM, seed=3), dim=1), normalize(random(5, DIM, seed=4), dim=1))]
    return Neighbours(torch.arange(100, 120), *rows, torch.arange(20.0), *own, torch.linspace(0.5, 1.0, 20), prototypes)


def local_rows(rank: int, world_size: int) -> slice:
    return slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)


CASES: dict[str, tuple[bool, BatchLoss]] = {
    "plain": (False, "info_nce"),
    "knowledge": (True, "info_nce"),
    "siglip": (False, "siglip"),
    "siglip with knowledge": (True, "siglip"),
}


class Towers(nn.Module):
    """Two linear encoders, a scale and a bias, in float64 so that a difference is one of method, not of rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.text = nn.Linear(5, DIM).double(), nn.Linear(7, DIM).double()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, rows: slice) -> Features:
        audio = normalize(self.audio(random(PAIRS, 5, seed=5)[rows]), dim=1)
        text = normalize(self.text(random(PAIRS, 7, seed=6)[rows]), dim=1)
        return audio, text, self.log_scale.exp(), self.bias


def ask_loss(features: Features, rows: slice, neighbours: Neighbours | None, loss: BatchLoss) -> Tensor:
    objective = AskObjective(KNOWLEDGE, half_life=10.0, loss=loss)
    return objective(*features, IDS[rows], VALID[rows], neighbours).loss


def in_batch_loss(features: Features, batch: GlobalBatch) -> Tensor:
    audio, text, scale, _ = features
    by_audio = info_nce(audio, batch.text_features, scale, batch)
    by_text = info_nce(text, batch.audio_features, scale, batch)
    return weighted_mean((by_audio + by_text) / 2, torch.ones(len(audio)), batch)


def gather_without_gradient(audio: Tensor, text: Tensor, *labels: Tensor) -> GlobalBatch:
    """What `gather` must not be: the usual all_gather, through which no gradient returns."""
    world_size = dist.get_world_size()
    collected = []
    for tensor in (audio, text, *labels):
        parts = [torch.empty_like(tensor) for _ in range(world_size)]
        dist.all_gather(parts, tensor.detach().contiguous())
        collected.append(torch.cat(parts))
    return GlobalBatch(*collected, offset=dist.get_rank() * len(audio), world_size=world_size)


def value_and_gradients(case: str, rank: int, world_size: int) -> dict[str, Tensor]:
    """A case's loss and gradients on one rank, averaged over ranks as DDP and DeepSpeed do."""
    towers, rows = Towers(), local_rows(rank, world_size)
    features = towers(rows)
    labels = (IDS[rows], VALID[rows])
    if case in CASES:
        knowledge, name = CASES[case]
        loss = ask_loss(features, rows, bank_rows(rows) if knowledge else None, name)
    elif case == "gathered":
        loss = in_batch_loss(features, gather(*features[:2], *labels))
    else:
        loss = in_batch_loss(features, gather_without_gradient(*features[:2], *labels))
    loss.backward()
    results = {"loss": loss.detach()} | {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    if world_size > 1:
        for tensor in results.values():
            dist.all_reduce(tensor)
            tensor /= world_size
    return results


def memory(rank: int, loss: BatchLoss) -> dict[str, int]:
    """What a step's loss takes on one rank: gathering, reliability, contrast, knowledge, forward and backward."""
    ids = LOCAL * rank + torch.arange(LOCAL)
    audio, text = (normalize(random(LOCAL, DIM, seed=seed), dim=1).requires_grad_() for seed in (rank, 9 + rank))
    known = bank_rows(slice(0, PAIRS))
    own = {name: value[ids % PAIRS] for name, value in vars(known).items() if name.startswith("own_")}
    objective = AskObjective(KNOWLEDGE, half_life=10.0, loss=loss)
    with Allocations() as allocations:
        objective(audio, text, torch.tensor(4.0), -2.0, ids, None, replace(known, **own)).loss.backward()
    return {"largest": allocations.largest, "peak": allocations.peak}


def one_late_answer(rank: int) -> dict[str, Any]:
    """Rank 0 has the bank's answer, the others do not."""
    features, rows = Towers()(local_rows(rank, dist.get_world_size())), local_rows(rank, dist.get_world_size())
    objective = AskObjective(KNOWLEDGE, half_life=10.0)
    output = objective(*features, IDS[rows], VALID[rows], bank_rows(rows) if rank == 0 else None)
    return {
        "used": output.knowledge_used,
        "terms": sorted(output.terms),
        "loss": output.loss.detach(),
        "known": int((output.reliability >= 0).sum()),
    }


def batch_of_rank(rank: int) -> dict[str, Any]:
    rows = local_rows(rank, dist.get_world_size())
    features = Towers()(rows)
    batch = gather(*features[:2], IDS[rows], VALID[rows])
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in vars(batch).items()}


def work(rank: int) -> dict[str, Any]:
    cases = (*CASES, "gathered", "without gradient")
    results: dict[str, Any] = {case: value_and_gradients(case, rank, dist.get_world_size()) for case in cases}
    return results | {
        "late": one_late_answer(rank),
        "batch": batch_of_rank(rank),
        "memory": {name: memory(rank, name) for name in ("info_nce", "siglip")},
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What every rank found, by the number of ranks."""
    return {size: run_ranks(work, size, tmp_path_factory.mktemp("ranks")) for size in (1, 2, 4)}


@pytest.fixture(params=[2, 4])
def ranks(request, worlds) -> list[dict[str, Any]]:
    return worlds[request.param]


def differences(ranks: list[dict[str, Any]], case: str, reference: str) -> dict[str, float]:
    """The largest absolute difference to one process, by name; every rank must hold the same average."""
    wanted = value_and_gradients(reference, 0, 1)
    for other in ranks[1:]:
        torch.testing.assert_close(other[case], ranks[0][case])
    return {name: float((ranks[0][case][name] - tensor).abs().max()) for name, tensor in wanted.items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(worlds, size, case):
    found = differences(worlds[size], case, case)
    learned = {"log_scale", "audio.weight", "audio.bias", "text.weight", "text.bias"}
    assert set(found) == {"loss", *learned} | ({"bias"} if "siglip" in case else set())
    assert max(found.values()) < 1e-6, found


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["info_nce", "siglip"])
def test_of_more_ranks_a_rank_holds_no_more_than_their_rows(worlds, name):
    largest, peak = (
        {size: max(rank["memory"][name][key] for rank in ranks) for size, ranks in worlds.items()}
        for key in ("largest", "peak")
    )
    assert set(largest.values()) == {LOCAL * LOCAL}  # more than all gathered rows or the products with the bank
    further_rows = 2 * LOCAL * 2 * DIM * 8  # bytes of float64, both modalities
    assert peak[4] - peak[2] < 6 * further_rows < 2 * LOCAL * LOCAL * 8 * 4
    assert max(peak[2], peak[4]) < 1.25 * peak[1]


@pytest.mark.multiprocess
def test_the_same_check_sees_a_gather_without_gradient(ranks):
    assert max(differences(ranks, "gathered", "gathered").values()) < 1e-6
    found = differences(ranks, "without gradient", "gathered")
    assert found["loss"] < 1e-6  # the value is right all the same
    assert found["audio.weight"] > 1e-3


@pytest.mark.multiprocess
def test_a_late_answer_on_one_rank_neither_blocks_nor_breaks_the_step(ranks):
    late = [rank["late"] for rank in ranks]
    assert [answer["used"] for answer in late] == [True] + [False] * (len(ranks) - 1)
    assert late[0]["terms"] == ["coarse", "consistency", "contrast"]
    assert late[1]["terms"] == ["contrast"]
    assert all(torch.isfinite(answer["loss"]) for answer in late)
    assert [answer["known"] for answer in late] == [PAIRS // len(ranks)] + [0] * (len(ranks) - 1)


@pytest.mark.multiprocess
def test_every_rank_sees_the_global_batch_in_rank_order(ranks):
    audio, text, *_ = Towers()(slice(0, PAIRS))
    for rank, results in enumerate(ranks):
        batch = results["batch"]
        torch.testing.assert_close(batch["audio_features"], audio.detach())
        torch.testing.assert_close(batch["text_features"], text.detach())
        assert batch["ids"].tolist() == IDS.tolist()
        assert batch["valid"].tolist() == VALID.tolist()
        assert (batch["offset"], batch["world_size"]) == (rank * PAIRS // len(ranks), len(ranks))


def test_without_torch_distributed_the_local_batch_is_the_global_one():
    audio, text, *_ = Towers()(slice(0, PAIRS))
    batch = gather(audio, text, IDS, VALID)
    assert batch.audio_features is audio
    assert (batch.offset, batch.world_size) == (0, 1)
