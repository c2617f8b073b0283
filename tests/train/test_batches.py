"""One effective batch, however it is cut: over ranks, ZeRO stages and chunks, in real gloo processes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from ask_dist.config import SIGMOID, AudioModel, BatchLoss, Knowledge, Model, Optimization, TextModel
from ask_dist.losses.objective import AskObjective
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train import checkpoint
from ask_dist.train.engine import Engine, learning_rate
from ask_dist.train.parameters import parameter_groups
from ask_dist.train.step import backward, embed
from tests.ranks import run_ranks

GLOBAL_BATCH, STEPS, LEARNING_RATE, CLIP = 16, 50, 1e-3, 0.5
STAGES = (0, 1, 2, 3)
OBSERVED = (0, 6, 25)  # steps whose gradients are compared
WORDS = ["a", "dog", "rain", "falls", "viola", "drum"]
CHUNKED = (False, True)
CHUNK = 3  # divides no local batch, so that the last chunk is smaller


def make_model(loss: BatchLoss) -> DualEncoder:
    """Without dropout, which differs from rank to rank; with matrices that ZeRO 3 really partitions."""
    torch.manual_seed(0)
    text = TextModel(width=160, layers=1, heads=2, max_tokens=8)
    config = Model(embedding_dim=12, dropout=0.0, audio=AudioModel(width=8, mel_bins=16), text=text)
    config = config.model_copy(update=SIGMOID if loss == "siglip" else {})
    model = build_dual_encoder(config, 8000, Vocabulary.train(WORDS, 280)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def optimization(stage: int, micro_batch_size: int, loss: BatchLoss) -> Optimization:
    return Optimization(
        loss=loss,
        zero_stage=stage,
        micro_batch_size=micro_batch_size,
        train_batch_size=GLOBAL_BATCH,
        learning_rate=LEARNING_RATE,
        gradient_clip=CLIP,
    )


def batch(model: DualEncoder, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sounds of a tone a word, tokens and ids; two pairs have one id."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(len(WORDS), (GLOBAL_BATCH, 3), generator=generator)
    tones = (2.0 * torch.pi * 300.0 * (1 + words.unsqueeze(2)) * torch.arange(1600) / 8000.0).sin().sum(dim=1) / 4
    ids = torch.arange(GLOBAL_BATCH)
    ids[5] = ids[11]
    captions = [" ".join(WORDS[word] for word in row) for row in words.tolist()]
    return tones, model.text.tokenize(captions), ids


def own_lengths() -> Tensor:
    """Samples of each clip of `batch`, if clips are not all as long; each part of it has several."""
    return 400 * torch.tensor([1 + number % 3 + number // 12 for number in range(GLOBAL_BATCH)])


def objective(loss: BatchLoss) -> AskObjective:
    return AskObjective(Knowledge(enabled=False), loss=loss)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole and averaged over ranks, between the backward pass and the step."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = safe_get_full_grad(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.detach().clone().float()
    return found


def train(engine: Engine, until: int, own: bool = False) -> dict[str, Any]:
    """Global losses, and gradients of the observed steps, of batches that depend on global_step alone."""
    rank, size = dist.get_rank(), engine.optimization.local_batch_size(dist.get_world_size())
    losses, observed = [], {}
    while engine.global_step < until:
        step = engine.global_step
        audio, tokens, ids = (values[rank * size :][:size] for values in batch(engine.module, step))
        inputs = (audio, tokens, own_lengths()[rank * size :][:size]) if own else (audio, tokens)
        features, chunks = embed(engine, inputs, engine.optimization.micro_batch_size, seed=step)
        loss = objective(engine.optimization.loss)(*features, ids).loss
        everywhere = loss.detach().clone()
        dist.all_reduce(everywhere)
        losses.append(float(everywhere) / dist.get_world_size())
        backward(engine, loss, chunks)
        if step in OBSERVED:
            observed[step] = gradients(engine.module)
        engine.step()
    return {"losses": losses, "gradients": observed}


def make_engine(stage: int, chunked: bool, loss: BatchLoss = "info_nce", offload: str = "none") -> Engine:
    local = GLOBAL_BATCH // dist.get_world_size()
    settings = optimization(stage, CHUNK if chunked else local, loss).model_copy(update={"offload": offload})
    return Engine(make_model(loss), settings, STEPS, torch.device("cpu"))


def every_way(rank: int, steps: int) -> dict[str, Any]:
    runs = {f"{stage} {chunked}": train(make_engine(stage, chunked), steps) for stage in STAGES for chunked in CHUNKED}
    runs |= {
        f"offload {stage}": train(make_engine(stage, chunked=True, offload="all" if stage == 3 else "optimizer"), steps)
        for stage in (1, 2, 3)
    }
    runs |= {f"own {chunked}": train(make_engine(2, chunked), steps, own=True) for chunked in CHUNKED}
    return runs | {"siglip": train(make_engine(2, chunked=True, loss="siglip"), steps)}


@pytest.fixture(
    scope="module",
    params=[(2, 8), *(pytest.param((world, STEPS), marks=pytest.mark.slow) for world in (1, 2, 4))],
    ids=lambda chosen: f"{chosen[0]} ranks, {chosen[1]} steps",
)
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """Every way to cut the batch."""
    world, steps = request.param
    return run_ranks(every_way, world, tmp_path_factory.mktemp("world"), steps)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return plain("info_nce")


def plain(loss_name: BatchLoss, own: bool = False) -> dict[str, Any]:
    """The whole batch at once, in plain torch; clips of their own lengths one by one."""
    model, settings = make_model(loss_name), optimization(0, GLOBAL_BATCH, loss_name)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6
    )
    losses, observed = [], {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, STEPS)
        audio, tokens, ids = batch(model, step)
        features = model(audio, tokens)
        if own:
            clips = zip(audio, own_lengths().tolist(), strict=True)
            rows = torch.cat([model.encode_audio(clip[None, :length]) for clip, length in clips])
            features = features._replace(audio_features=rows)
        loss = objective(loss_name)(*features, ids).loss
        loss.backward()
        if step in OBSERVED:
            observed[step] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "gradients": observed}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("stage", "chunked"), list(itertools.product(STAGES, CHUNKED)))
def test_losses_and_gradients_are_those_of_the_whole_batch(ranks, reference, stage, chunked):
    for rank in ranks:
        assert_equal(rank[f"{stage} {chunked}"], reference)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_chunks_add_up_where_the_optimizer_lies_on_the_host(ranks, reference, stage):
    for rank in ranks:
        assert_equal(rank[f"offload {stage}"], reference)


def assert_equal(run: dict[str, Any], reference: dict[str, Any], rtol: float = 0.0) -> None:
    assert run["losses"] == pytest.approx(reference["losses"][: len(run["losses"])], abs=1e-4)
    assert set(run["gradients"]) == {step for step in OBSERVED if step < len(run["losses"])}
    for step in run["gradients"]:
        assert run["gradients"][step].keys() == reference["gradients"][step].keys()
        for name, wanted in reference["gradients"][step].items():
            torch.testing.assert_close(run["gradients"][step][name], wanted, atol=1e-5, rtol=rtol, msg=name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("chunked", CHUNKED)
def test_clips_of_their_own_lengths_train_as_if_each_were_alone(ranks, reference, chunked):
    alone = plain("info_nce", own=True)
    assert abs(alone["losses"][0] - reference["losses"][0]) > 1e-3
    for rank in ranks:
        assert_equal(rank[f"own {chunked}"], alone, rtol=1e-5)  # of gradients near 1, after steps that add up rounding


@pytest.mark.multiprocess
def test_the_sigmoid_loss_in_chunks_is_that_of_the_whole_batch(ranks):
    reference = plain("siglip")
    assert "logit_bias" in reference["gradients"][0]
    for rank in ranks:
        assert_equal(rank["siglip"], reference, rtol=1e-4)  # a sum over all columns, it has gradients above 1


def test_the_reference_has_gradients_to_differ_from(reference):
    for observed in reference["gradients"].values():
        for name, gradient in observed.items():
            assert gradient.abs().max() > 1e-4, name
    assert reference["losses"][-1] < 0.7 * reference["losses"][0]


def leg(rank: int, stage: int, until: int, state: dict[str, Tensor] | None, chunked: bool) -> dict[str, Any]:
    engine = make_engine(stage, chunked)
    if state is not None:
        engine.load_state(state)
    return train(engine, until) | {"state": engine.state()}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_goes_on_over_zero_2_on_two_zero_1_on_one_and_zero_3_on_four_ranks(reference, tmp_path):
    losses, state = [], None
    for world, stage, until, chunked in ((2, 2, 15, True), (1, 1, 30, True), (4, 3, STEPS, False)):
        run = run_ranks(leg, world, tmp_path / str(world), stage, until, state, chunked)[0]
        losses += run["losses"]
        (saved := tmp_path / f"saved_{until}").mkdir()
        facts = {"global_step": until, "samples_seen": 0, "skipped_steps": 0, "lineage": "same"}
        checkpoint.save(saved, engine=run["state"], arrays={}, banks={}, **facts)
        assert checkpoint.load_manifest(saved, "same").global_step == until
        state = checkpoint.load_engine(saved)
    assert losses == pytest.approx(reference["losses"], abs=1e-4)
