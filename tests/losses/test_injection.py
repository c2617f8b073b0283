"""The bank's rows as negatives, and the agreement about them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.prototypes import unit_rows
from ask_dist.losses.injection import Neighbours, bank_contrast, consistency, jensen_shannon, similarities


def unit(rows: int, seed: int, dim: int = 6) -> Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def neighbours(rows: int, age: list[float], own_age: list[float]) -> Neighbours:
    local = len(own_age)
    ids, ages = torch.arange(100, 100 + rows), torch.tensor(age)
    own = (unit(local, 5), unit(local, 6), torch.tensor(own_age), torch.ones(local))
    return Neighbours(ids, unit(rows, 1), unit(rows, 2), ages, *own, torch.ones(rows))


def slow_bank_contrast(query: Tensor, own: Tensor, rows: Tensor, counts: list[float], scale: float) -> float:
    """Of one pair, in plain Python; counts[j] is how much row j counts."""
    right = math.exp(scale * float(query @ own))
    wrong = sum(count * math.exp(scale * float(query @ row)) for count, row in zip(counts, rows, strict=True))
    return -math.log(right / (right + wrong))


def test_a_row_counts_by_how_much_older_it_is_than_the_pairs_own():
    known = neighbours(3, [0.0, 10.0, 20.0], [0.0, 10.0])
    features = unit(2, 3)
    found = bank_contrast(features, known.own_text, features @ known.text.T, known, torch.tensor(5.0), half_life=10.0)
    for place, counts in enumerate([[1.0, 0.5, 0.25], [1.0, 1.0, 0.5]]):
        wanted = slow_bank_contrast(features[place], known.own_text[place], known.text, counts, 5.0)
        assert float(found[place]) == pytest.approx(wanted, rel=1e-5)


def test_without_a_half_life_every_row_counts_in_full():
    known = neighbours(2, [0.0, 1e6], [0.0])
    features = unit(1, 3)
    products = features @ known.audio.T
    found = bank_contrast(features, known.own_audio, products, known, torch.tensor(5.0), half_life=math.inf)
    wanted = slow_bank_contrast(features[0], known.own_audio[0], known.audio, [1.0, 1.0], 5.0)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_a_drift_common_to_the_whole_bank_teaches_nothing():
    """The right answer is as old as the wrong ones: a direction that only tells age gets no gradient."""
    age_direction = torch.zeros(7)
    age_direction[6] = 1.0
    stale = torch.cat([unit(9, 1), 0.5 * torch.ones(9, 1)], dim=1)
    own = (stale[8:], stale[8:], torch.zeros(1), torch.ones(1))
    known = Neighbours(torch.arange(8), stale[:8], stale[:8], torch.zeros(8), *own, torch.ones(8))
    query = torch.cat([unit(1, 3), torch.zeros(1, 1)], dim=1).requires_grad_()
    products = query @ known.text.T
    bank_contrast(query, known.own_text, products, known, torch.tensor(5.0), math.inf).sum().backward()
    assert query.grad is not None
    assert abs(float(query.grad[0] @ age_direction)) < 1e-6
    assert float(query.grad.norm()) > 0.1


def test_neighbours_are_made_of_the_banks_answer():
    rng = np.random.default_rng(0)
    audio, text = (unit_rows(rng.normal(size=(20, 6))) for _ in range(2))
    bank = KnowledgeBank(6, 20, dtype="float32")
    bank.upsert(np.arange(20), audio, text, None, step=3)
    known = Neighbours.of(bank.search_ids(np.array([4, 99, 2]), 5), None)
    assert not set(known.ids.tolist()) & {4, 2}
    assert known.own_age.tolist() == [0.0, -1.0, 0.0]
    torch.testing.assert_close(known.own_text[[0, 2]], torch.tensor(text[[4, 2]]), atol=1e-3, rtol=0)
    assert known.prototypes == []


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


def disagreement(audio: Tensor, text: Tensor, bank_audio: Tensor, bank_text: Tensor, temperature: float) -> Tensor:
    return consistency(similarities(audio, text, [bank_text, bank_audio]), temperature)


def test_consistency_agrees_with_a_loop():
    audio, text, bank_audio, bank_text = unit(4, 3), unit(4, 4), unit(9, 5), unit(9, 6)
    wanted = [slow_consistency(a, t, bank_audio, bank_text, 0.2) for a, t in zip(audio, text, strict=True)]
    torch.testing.assert_close(disagreement(audio, text, bank_audio, bank_text, 0.2), torch.tensor(wanted))


def test_halves_that_agree_cost_nothing_and_gradients_pull_others_together():
    bank_audio, bank_text = unit(9, 5), unit(9, 6)
    agreeing = unit(3, 7)
    torch.testing.assert_close(disagreement(agreeing, agreeing, bank_audio, bank_text, 0.1), torch.zeros(3))
    audio, text = unit(3, 8).requires_grad_(), unit(3, 9).requires_grad_()
    before = disagreement(audio, text, bank_audio, bank_text, 0.1)
    before.sum().backward()
    after = disagreement(audio - 0.01 * audio.grad, text - 0.01 * text.grad, bank_audio, bank_text, 0.1)
    assert after.sum() < before.sum()
    assert (before <= math.log(2.0)).all()


def slow_jensen_shannon(p: list[float], q: list[float]) -> float:
    def divergence(x: list[float], y: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True) if a > 0)

    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (divergence(p, m) + divergence(q, m)) / 2


def test_equal_distributions_do_not_diverge():
    log_p = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    torch.testing.assert_close(jensen_shannon(log_p, log_p), torch.zeros(4), atol=1e-7, rtol=0)


def test_disjoint_distributions_diverge_by_ln_2():
    log_p = torch.tensor([[60.0, 0.0]]).log_softmax(dim=1)
    assert jensen_shannon(log_p, log_p.flip(1)).item() == pytest.approx(math.log(2.0), abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=12))
def test_agrees_with_the_definition_and_stays_in_bounds(logits):
    log_p, log_q = torch.tensor(logits, dtype=torch.float64).T.log_softmax(dim=1).unsqueeze(1)
    divergence = jensen_shannon(log_p, log_q).item()
    assert divergence == pytest.approx(slow_jensen_shannon(log_p.exp()[0].tolist(), log_q.exp()[0].tolist()), abs=1e-9)
    assert divergence == pytest.approx(jensen_shannon(log_q, log_p).item(), abs=1e-12)
    assert -1e-9 <= divergence <= math.log(2.0) + 1e-9
