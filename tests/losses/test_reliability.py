"""Jensen-Shannon divergence, the agreement of neighbours, and the weights made of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ask_dist.losses.reliability import (
    UNKNOWN,
    jensen_shannon,
    pair_reliability,
    per_query_log_probabilities,
    reliability_weights,
)


def slow_jensen_shannon(p: list[float], q: list[float]) -> float:
    def divergence(x: list[float], y: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True) if a > 0)

    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (divergence(p, m) + divergence(q, m)) / 2


def clustered_bank(clusters: int, rows: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Paired unit rows round the centres of `clusters` topics; audio and text have centres of their own."""
    generator = torch.Generator().manual_seed(3)
    topic = torch.arange(rows) % clusters
    sides = []
    for _ in ("audio", "text"):
        centres = normalize(torch.randn(clusters, 32, generator=generator), dim=1)
        sides.append(normalize(centres[topic] + spread * torch.randn(rows, 32, generator=generator), dim=1))
    return sides[0], sides[1], topic


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


def test_the_temperature_is_each_querys_own():
    similarities = torch.tensor([[0.9, 0.6, 0.3, 0.0]])
    log_p = per_query_log_probabilities(similarities, rank=3, shape=3.0)  # (0.9 - 0.3) / 3 = 0.2
    torch.testing.assert_close(log_p, (similarities / 0.2).log_softmax(dim=1))


def test_spreading_the_embeddings_leaves_the_distribution_as_it_is():
    similarities = torch.rand(5, 40, generator=torch.Generator().manual_seed(1))
    narrow = per_query_log_probabilities(0.1 * similarities + 0.5, rank=32, shape=3.0)
    torch.testing.assert_close(narrow, per_query_log_probabilities(similarities, rank=32, shape=3.0), atol=1e-4, rtol=0)


def test_equal_similarities_give_a_finite_uniform_distribution():
    log_p = per_query_log_probabilities(torch.full((1, 8), 0.3), rank=4, shape=3.0)
    torch.testing.assert_close(log_p.exp(), torch.full((1, 8), 1 / 8))


def test_agreeing_pairs_are_reliable_and_swapped_ones_are_not():
    audio, text, topic = clustered_bank(clusters=8, rows=264, spread=0.05)
    queries, bank = slice(0, 8), slice(8, None)  # one query a topic
    right = pair_reliability(audio[queries], text[queries], audio[bank], text[bank], rank=32, shape=3.0)
    swapped = pair_reliability(audio[queries], text[queries].roll(1, 0), audio[bank], text[bank], rank=32, shape=3.0)
    assert topic[queries].unique().numel() == 8
    assert right.min() > 0.7
    assert swapped.max() < 0.3
    assert (swapped >= 0).all()
    assert (right <= 1).all()


def test_a_small_bank_tells_nothing():
    audio, text, _ = clustered_bank(clusters=4, rows=31, spread=0.1)
    reliability = pair_reliability(audio[:3], text[:3], audio, text, rank=32, shape=3.0)
    assert reliability.tolist() == [UNKNOWN] * 3 == [-1.0] * 3


def test_reliability_has_no_gradient():
    audio, text, _ = clustered_bank(clusters=4, rows=64, spread=0.1)
    reliability = pair_reliability(audio[:3].requires_grad_(), text[:3], audio, text, rank=32, shape=3.0)
    assert not reliability.requires_grad


def test_weights_by_hand():
    weights = reliability_weights(torch.tensor([0.2, 0.4, 0.6]), torch.ones(3, dtype=torch.bool), gamma=2.0)
    # (r / 0.4)^2 = 0.25, 1, 2.25, whose mean is 3.5 / 3
    torch.testing.assert_close(weights, torch.tensor([0.25, 1.0, 2.25]) * 3 / 3.5)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 4.0])
def test_known_valid_weights_have_mean_1_and_the_unknown_weigh_1(gamma):
    reliability = torch.rand(16, generator=torch.Generator().manual_seed(2))
    reliability[[3, 7]] = UNKNOWN
    valid = torch.ones(16, dtype=torch.bool)
    valid[[7, 9]] = False
    weights = reliability_weights(reliability, valid, gamma)
    known = valid & (reliability >= 0)
    assert known.sum() == 13
    assert weights[known].mean().item() == pytest.approx(1.0, abs=1e-5)
    assert weights[3] == 1.0


def test_gamma_0_weighs_all_alike():
    weights = reliability_weights(torch.tensor([0.0, 0.3, 1.0]), torch.ones(3, dtype=torch.bool), gamma=0.0)
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_nothing_known_weighs_all_alike():
    weights = reliability_weights(torch.full((4,), UNKNOWN), torch.ones(4, dtype=torch.bool), gamma=4.0)
    assert weights.tolist() == [1.0] * 4
