"""One global step in two real processes, with a real bank's answers, one of which holds a value that is no number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ask_dist import config as configuration
from ask_dist.bank.local import LocalBankClient
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.cluster import Actors
from ask_dist.data.leaks import HeldOut
from ask_dist.data.loader import TrainLoader
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import ShardList
from ask_dist.losses.injection import Neighbours
from ask_dist.losses.objective import AskObjective
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train.engine import Engine
from ask_dist.train.state import TrainState
from ask_dist.train.step import train_step
from ask_dist.train.tracking import StageClock
from tests.ranks import run_ranks
from tests.train.test_embeddings import CLIPS, RATE, SECONDS, noise

BATCH, FIRST, BROKEN_RANK, STEP = 4, 6, 1, 0.1
# Of a bank's answer, what enters the loss or, as the age of an own row does, the gradient alone.
ANSWER = ("audio", "text", "age", "own_audio", "own_text", "own_age", "prototypes")
FIELDS = (*ANSWER, "clip")


def seconds_of(number: int) -> float:
    """How long a clip is: whole steps."""
    return STEP * (1 + number % 5)


class Link:
    """A real bank behind the two calls that a step makes; of its answers the field `broken` holds a NaN."""

    def __init__(self) -> None:
        self._client = LocalBankClient(KnowledgeBank(dim=16, capacity=100), neighbours=4)
        self.broken: str | None = None
        self.upserts = 0

    def exchange(self, ids: Tensor, following: Tensor, step: int, total_steps: int) -> Neighbours | None:
        self._client.prefetch(ids.numpy())
        answer = Neighbours.of(self._client.collect(), self._client.prototypes)
        if self.broken is None:
            return answer
        values = answer.prototypes[0][0] if self.broken == "prototypes" else getattr(answer, self.broken)
        values[0] = math.nan
        return answer

    def upsert(self, ids: Tensor, audio: Tensor, text: Tensor, reliability: Tensor, global_step: int) -> None:
        rows = (tensor.detach().float().numpy() for tensor in (audio, text, reliability))
        self._client.upsert(ids.numpy(), *rows, global_step)
        self._client.rebuild_prototypes([3])
        self.upserts += 1


def make_state(rank: int, folder: Path, chunk: int) -> TrainState:
    tree: dict[str, Any] = {
        "name": "noise",
        "data": {"train": str(folder), "clip_seconds": SECONDS, "length_step": STEP, "lanes": 2},
        "model": {"embedding_dim": 16, "audio": {"width": 8}, "text": {"width": 32, "heads": 2}},
        "optimization": {"micro_batch_size": chunk, "train_batch_size": 2 * BATCH, "max_skipped": 3, "log_every": 1},
        "knowledge": {"start": 0.0, "neighbours": 4, "reliability": {"start": 0.0, "rank": 4}},
    }
    config = configuration.parse(tree)
    shards = {"train": ShardList.load(folder)}
    torch.manual_seed(0)
    model = build_dual_encoder(config.model, RATE, Vocabulary.train([f"the noise {n}" for n in range(CLIPS)], 300))
    total = FIRST + 2 * len(FIELDS)
    return TrainState(
        config=config,
        rank=rank,
        world_size=2,
        engine=Engine(model, config.optimization, total, torch.device("cpu")),
        objective=AskObjective(config.knowledge),
        loader=TrainLoader(
            shards["train"],
            rank=rank,
            world_size=2,
            local_batch_size=BATCH,
            seed=5,
            sample_rate=RATE,
            clip_seconds=SECONDS,
            lanes=2,
            tokenize=model.text.portable_tokenize(),
            length_step=STEP,
        ),
        shards=shards,
        held_out=HeldOut(),
        knowledge=Link(),  # type: ignore[arg-type]
        actors=Actors(),
        total_steps=total,
        lineage="",
        log=None,
        audit=None,
        clock=StageClock(torch.device("cpu")),
    )


def _forbidden(captions: list[str]) -> Tensor:
    raise AssertionError("the step called the tokenizer")


def broken_steps(rank: int, folder: str, chunk: int) -> list[dict[str, Any]]:
    """Whole steps first, then in turn one whose answer or clip is broken on one rank, and a whole one."""
    state = make_state(rank, Path(folder), chunk)
    state.engine.module.text.tokenize = _forbidden  # tokens come with the batch
    found = []
    batches = state.loader.batches()
    batch, before = next(batches), state.engine.state()
    for number in range(state.total_steps):
        turn, whole = divmod(number - FIRST, 2)
        broken = FIELDS[turn] if number >= FIRST and not whole else None
        state.knowledge.broken = broken if rank == BROKEN_RANK and broken in ANSWER else None
        if rank == BROKEN_RANK and broken == "clip":
            batch.audio[0, 0] = math.nan
        following, written = next(batches), state.knowledge.upserts
        values, pairs, seconds = train_step(state, batch, following)
        after = state.engine.state()
        moved = [name for name in before if name != "global_step" and not torch.equal(before[name], after[name])]
        found.append(
            {
                "field": broken,
                "pairs": pairs,
                "seconds": seconds,
                "own_seconds": sum(seconds_of(int(key[-2:])) for key in batch.keys if key),
                "knowledge": values.get("train/knowledge_used"),
                "skipped": state.skipped_steps,
                "written": state.knowledge.upserts - written,
                "moved": moved,
                "steps": int(after["global_step"] - before["global_step"]),
                "weights": after,
                "diagnostics": dict(state.diagnostics),
            }
        )
        batch, before = following, after
    batches.close()
    return found


@pytest.fixture(scope="module", params=[BATCH, BATCH // 2], ids=["at once", "in chunks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("step")
    clips = (noise(number, seconds_of(number)) for number in range(CLIPS))
    write_shards(clips, folder / "train", "train", clips_per_shard=8)
    return run_ranks(broken_steps, 2, folder / "ranks", str(folder / "train"), request.param)


@pytest.mark.multiprocess
def test_whole_answers_are_trained_on(ranks):
    for steps in ranks:
        whole = [step for step in steps if step["field"] is None]
        assert all(step["moved"] and step["pairs"] > 0 and step["written"] == 1 for step in whole)
        assert all(0.0 <= step["diagnostics"]["train/out_of_batch_gradient_share"] <= 1.0 for step in whole)
    for here, there in zip(*ranks, strict=True):
        heard = here["own_seconds"] + there["own_seconds"] if here["field"] is None else 0.0
        assert here["seconds"] == there["seconds"] == pytest.approx(heard, rel=1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", FIELDS)
def test_a_broken_answer_or_clip_on_one_rank_is_a_step_that_all_leave_out(ranks, name):
    number = FIRST + 2 * FIELDS.index(name)
    for steps in ranks:
        step, then = steps[number : number + 2]
        assert step["field"] == name
        assert (step["pairs"], step["moved"], step["written"], step["steps"]) == (0, [], 0, 1)
        assert (step["skipped"], then["skipped"]) == (FIELDS.index(name) + 1,) * 2
        assert then["moved"]
        assert then["knowledge"] == 1.0
        assert all(torch.isfinite(value).all() for value in then["weights"].values())
    here, there = (steps[number + 1]["weights"] for steps in ranks)
    assert here.keys() == there.keys()
    assert all(torch.equal(value, there[key]) for key, value in here.items())
