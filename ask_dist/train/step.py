"""One global step of a worker: knowledge, forward, loss, backward, update, rows for the bank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ask_dist.data.loader import Batch
from ask_dist.evaluate.drift import out_of_span_share
from ask_dist.losses.grad_cache import GradCache
from ask_dist.losses.objective import ObjectiveOutput
from ask_dist.models.dual_encoder import Features
from ask_dist.train.engine import Engine
from ask_dist.train.mixing import mix
from ask_dist.train.state import TrainState


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or gradients that are not finite."""


def train_step(state: TrainState, batch: Batch, following: Batch) -> tuple[dict[str, float], int, float]:
    """One global step on this rank.

    Returns:
        What to log, and of the pairs that all ranks trained on the number and the seconds of sound.
    """
    engine, clock = state.engine, state.clock
    step, device = engine.global_step, engine.device
    # Dropout is a function of the step, so an exact resume needs no generator states.
    torch.manual_seed(step_seed(state.config.seed, step, state.rank))
    with clock("knowledge"):
        neighbours = None
        if state.knowledge:
            neighbours = state.knowledge.exchange(batch.ids, following.ids, step, state.total_steps)
    batch, mixed = mix(batch, state.config.augment.mix_share, device, engine.module.text.tokenize)
    ids, valid = batch.ids.to(device, non_blocking=True), batch.valid.to(device, non_blocking=True)
    with clock("forward"):
        inputs = state.embeddings.inputs(batch)
        seed = step_seed(state.config.seed, step, state.rank)
        features, chunks = embed(engine, inputs, state.config.optimization.micro_batch_size, seed)
    probe = (step + 1) % state.config.optimization.log_every == 0
    if probe:
        for rows in features[:2]:
            if rows.requires_grad:  # not those of a frozen tower without a projection
                rows.retain_grad()
    with clock("loss"):
        output = state.objective(*features, ids, valid, neighbours, state.progress, mixed)
        loss, pairs, seconds, finite = _agree(output.loss, valid, _heard(state, batch))
    if not finite:  # on any rank: all leave the step out together
        engine.skip()
        return _skipped(state), 0, 0.0
    with clock("backward"):
        backward(engine, output.loss, chunks)
    with clock("step"):
        result = engine.step()
    if not result.updated:
        return _skipped(state), 0, 0.0
    state.skipped_in_a_row = 0
    if probe:  # only of gradients that are known to be finite
        state.diagnostics = _diagnostics(features, output)
    if state.knowledge:
        with clock("knowledge"):
            rows = (features.audio_features, features.text_features, output.reliability)
            clips = valid & ~mixed
            state.knowledge.upsert(ids[clips], *(values[clips] for values in rows), step)
    _remember_trust(state, batch, output)
    if state.audit is not None:
        state.audit.log(step, output.batch.ids[output.batch.valid].tolist())
    clock.step()
    state.samples_seen += pairs
    return _step_metrics(state, loss, features, output, result), pairs, seconds


def embed(
    engine: Engine, inputs: tuple[Tensor, ...], micro_batch_size: int, seed: int
) -> tuple[Features, GradCache | None]:
    """Features of this rank's batch; of more pairs than fit at once in chunks, for `backward`.

    Args:
        inputs: audio [local, ...] and tokens [local, ...], or vectors in their place, on any device; where clips have
            their own lengths these, int64 [local] on the CPU.
        micro_batch_size: most pairs at once. Local batches are equally large, so every rank has as many chunks.
        seed: of the chunks' dropout.
    """

    def encode(audio: Tensor, tokens: Tensor, *lengths: Tensor) -> Features:
        moved = (rows.to(engine.device, non_blocking=True) for rows in (audio, tokens))
        return engine(*moved, *lengths)

    if len(inputs[0]) <= micro_batch_size:
        return encode(*inputs), None
    chunks = GradCache(encode, inputs, micro_batch_size, seed)
    return Features(*chunks.features), chunks


def backward(engine: Engine, loss: Tensor, chunks: GradCache | None) -> None:
    """Gradients of a loss of what `embed` gave, averaged over ranks: those of the whole batch at once."""
    if chunks is None:
        engine.backward(loss)
    else:
        loss.backward()
        chunks.backward(engine.backward)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout on a rank, independent of every other step's and rank's."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _skipped(state: TrainState) -> dict[str, float]:
    """Counts a step that was left out, and what to log of it.

    Raises:
        NotFinite: there were `max_skipped` in a row. Ray Train then goes back to the last checkpoint, as often as
            `cluster.max_failures` allows.
    """
    state.clock.step()
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= state.config.optimization.max_skipped:
        raise NotFinite(
            f"{state.skipped_in_a_row} steps in a row up to {state.engine.global_step} had a loss or gradients that "
            "are not finite, optimization.max_skipped allows no more; lower optimization.learning_rate"
        )
    return {"train/skipped_steps": float(state.skipped_steps)}


def _step_metrics(state: TrainState, loss: float, features: Features, output: ObjectiveOutput, result: Any) -> dict:
    return {
        "train/loss": loss,
        "train/logit_scale": float(features.logit_scale),
        **({"train/logit_bias": float(features.logit_bias)} if state.objective.loss == "siglip" else {}),
        "train/learning_rate": result.learning_rate,
        "train/gradient_norm": result.gradient_norm,
        "train/knowledge_used": float(output.knowledge_used),
        "train/skipped_steps": float(state.skipped_steps),
        **{f"loss/{name}": float(value) for name, value in output.terms.items()},
    }


def _heard(state: TrainState, batch: Batch) -> float:
    """Seconds of the valid clips of this rank, as long as the encoder hears them."""
    data = state.config.data
    if batch.lengths is None:
        return int(batch.valid.sum()) * data.clip_seconds
    return int(batch.lengths[batch.valid].sum()) / data.sample_rate


def _agree(loss: Tensor, valid: Tensor, seconds: float) -> tuple[float, int, float, bool]:
    """Mean loss, valid pairs and their seconds, and whether the loss is finite on every rank: one collective."""
    finite = torch.isfinite(loss.detach())
    heard = torch.full_like(loss.detach(), seconds)
    facts = torch.stack([torch.where(finite, loss.detach(), 0.0), valid.sum().float(), heard, (~finite).float()])
    dist.all_reduce(facts)
    total, pairs, seconds, broken = facts.tolist()
    return total / dist.get_world_size(), int(pairs), seconds, broken == 0


def _diagnostics(features: Features, output: ObjectiveOutput) -> dict[str, float]:
    """GLB: the gradient's share outside the span of the batch; and whether one modality learns faster.

    The share is left out where the batch's rows, audio and text, may span the whole space: nothing lies outside then.
    """
    audio, text = features.audio_features.grad, features.text_features.grad
    if audio is None or text is None:
        return {}
    found = {"train/gradient_norm_ratio": float(audio.norm() / text.norm().clamp(min=1e-12))}
    span = torch.cat([output.batch.audio_features.detach(), output.batch.text_features.detach()])
    if len(span) <= span.shape[1]:
        shares = [out_of_span_share(gradient.detach().float(), span.float()) for gradient in (audio, text)]
        found["train/out_of_batch_gradient_share"] = sum(shares) / 2
    return found


def _remember_trust(state: TrainState, batch: Batch, output: ObjectiveOutput) -> None:
    """Keeps the reliability of the last epoch's pairs, for the report's histogram."""
    if state.engine.global_step > state.total_steps - state.loader.steps_per_epoch:
        known = batch.valid & (output.reliability.cpu() >= 0)
        state.trusted.append((output.reliability.cpu()[known], batch.swapped[known]))
