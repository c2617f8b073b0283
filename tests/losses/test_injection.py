"""The bank's rows as negatives, and the agreement about them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ask_dist.losses.gather import GlobalBatch
from ask_dist.losses.injection import Neighbours, consistency, extra_logits


def unit(rows: int, seed: int, dim: int = 6) -> Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def global_batch(ids: list[int]) -> GlobalBatch:
    rows = unit(len(ids), 0)
    flags = torch.ones(len(ids), dtype=torch.bool)
    return GlobalBatch(rows, rows, torch.ones(len(ids)), torch.tensor(ids), flags, 0, 1)


def neighbours(ids: list[int], age: list[float]) -> Neighbours:
    return Neighbours(torch.tensor(ids), unit(len(ids), 1), unit(len(ids), 2), torch.tensor(age))


def test_a_fresh_row_counts_in_full_and_one_of_half_life_half():
    known = neighbours([7, 8, 9], [0.0, 10.0, 20.0])
    features, scale = unit(2, 3), torch.tensor(5.0)
    logits = extra_logits(features, known.text, known, global_batch([1, 2]), scale, half_life=10.0)
    full = scale * features @ known.text.T
    torch.testing.assert_close(logits.exp(), full.exp() * torch.tensor([1.0, 0.5, 0.25]))


def test_without_a_half_life_no_row_fades():
    known = neighbours([7, 8], [0.0, 1e6])
    logits = extra_logits(unit(2, 3), known.text, known, global_batch([1]), torch.tensor(1.0), half_life=math.inf)
    torch.testing.assert_close(logits, unit(2, 3) @ known.text.T)


def test_rows_that_are_in_the_global_batch_do_not_count():
    known = neighbours([7, 2, 9], [0.0, 0.0, 0.0])
    logits = extra_logits(unit(2, 3), known.text, known, global_batch([1, 2]), torch.tensor(5.0), half_life=10.0)
    assert torch.isneginf(logits[:, 1]).all()
    assert torch.isfinite(logits[:, [0, 2]]).all()


def slow_consistency(audio: Tensor, text: Tensor, bank_audio: Tensor, bank_text: Tensor, temperature: float) -> float:
    """Of one pair, in plain Python."""
    divergences = []
    for rows in (bank_text, bank_audio):
        distributions = []
        for query in (audio, text):
            exponentials = [math.exp(float(query @ row) / temperature) for row in rows]
            distributions.append([value / sum(exponentials) for value in exponentials])
        middle = [sum(pair) / 2 for pair in zip(*distributions, strict=True)]
        for distribution in distributions:
            divergences.append(sum(p * math.log(p / m) for p, m in zip(distribution, middle, strict=True)))
    return sum(divergences) / 4


def test_consistency_agrees_with_a_loop():
    audio, text, bank_audio, bank_text = unit(4, 3), unit(4, 4), unit(9, 5), unit(9, 6)
    wanted = [slow_consistency(a, t, bank_audio, bank_text, 0.2) for a, t in zip(audio, text, strict=True)]
    torch.testing.assert_close(consistency(audio, text, bank_audio, bank_text, 0.2), torch.tensor(wanted))


def test_halves_that_agree_cost_nothing_and_gradients_pull_others_together():
    bank_audio, bank_text = unit(9, 5), unit(9, 6)
    agreeing = unit(3, 7)
    torch.testing.assert_close(consistency(agreeing, agreeing, bank_audio, bank_text, 0.1), torch.zeros(3))
    audio, text = unit(3, 8).requires_grad_(), unit(3, 9).requires_grad_()
    before = consistency(audio, text, bank_audio, bank_text, 0.1)
    before.sum().backward()
    after = consistency(audio - 0.01 * audio.grad, text - 0.01 * text.grad, bank_audio, bank_text, 0.1)
    assert after.sum() < before.sum()
    assert (before <= math.log(2.0)).all()
