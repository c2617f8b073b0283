"""The agreement of a pair about the bank against that of wrong pairs, and the weights made of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ask_dist.losses.gather import GlobalBatch
from ask_dist.losses.injection import Neighbours
from ask_dist.losses.reliability import (
    UNKNOWN,
    pair_reliability,
    per_query_log_probabilities,
    reliability_weights,
    running_reliability,
    wrong_share,
)


def clustered_bank(clusters: int, rows: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Paired unit rows round the centres of `clusters` topics; audio and text have centres of their own."""
    generator = torch.Generator().manual_seed(3)
    topic = torch.arange(rows) % clusters
    sides = []
    for _ in ("audio", "text"):
        centres = normalize(torch.randn(clusters, 32, generator=generator), dim=1)
        sides.append(normalize(centres[topic] + spread * torch.randn(rows, 32, generator=generator), dim=1))
    return sides[0], sides[1], topic


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


def batch_of(audio: Tensor, text: Tensor, **changes: Any) -> GlobalBatch:
    ids = torch.arange(len(audio))
    return replace(GlobalBatch(audio, text, ids, torch.ones_like(ids, dtype=torch.bool), 0, 1), **changes)


def bank_of(audio: Tensor, text: Tensor) -> Neighbours:
    none, rows = torch.zeros(0), torch.full((len(audio),), UNKNOWN)
    return Neighbours(
        torch.arange(len(audio)) + 1000, audio, text, torch.zeros(len(audio)), none, none, none, none, rows
    )


def slow_reliability(batch: GlobalBatch, known: Neighbours, pair: int, rank: int, shape: float) -> float:
    """The share of wrong pairs beaten by one pair, in plain Python."""

    def roots(query: Tensor, rows: Tensor) -> list[float]:
        similarities = sorted((float(query @ row) for row in rows), reverse=True)
        temperature = max((similarities[0] - similarities[rank - 1]) / shape, 1e-4)
        exponentials = [math.exp((float(query @ row) - similarities[0]) / temperature) for row in rows]
        return [math.sqrt(value / sum(exponentials)) for value in exponentials]

    def agree(i: int, j: int) -> float:
        p, q = roots(batch.audio_features[i], known.audio), roots(batch.text_features[j], known.text)
        return sum(x * y for x, y in zip(p, q, strict=True))

    others = [j for j in range(len(batch.ids)) if batch.valid[j] and batch.ids[j] != batch.ids[pair]]
    beaten = [agree(pair, pair) > agree(pair, j) for j in others] + [agree(pair, pair) > agree(j, pair) for j in others]
    return sum(beaten) / len(beaten)


def test_agrees_with_a_loop_over_wrong_pairs():
    audio, text, _ = clustered_bank(clusters=5, rows=60, spread=0.3)
    ids = torch.tensor([1, 2, 3, 2, 5, 6])
    valid = torch.tensor([True, True, True, True, False, True])
    batch = batch_of(audio[:6], text[:6], ids=ids, valid=valid, offset=3, world_size=2)
    known = bank_of(audio[6:], text[6:])
    found = pair_reliability(batch, 3, known, rank=8, shape=3.0)
    wanted = [slow_reliability(batch, known, pair, 8, 3.0) for pair in (3, 4, 5)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_agreeing_pairs_are_reliable_and_swapped_ones_are_as_good_as_chance():
    audio, text, topic = clustered_bank(clusters=16, rows=528, spread=0.05)
    known = bank_of(audio[16:], text[16:])
    assert topic[:16].unique().numel() == 16
    right = pair_reliability(batch_of(audio[:16], text[:16]), 16, known, rank=32, shape=3.0)
    swapped = torch.cat(
        [
            pair_reliability(batch_of(audio[:16], text[:16].roll(by, 0)), 16, known, rank=32, shape=3.0)
            for by in range(1, 16)
        ]
    )
    assert right.min() == 1.0
    assert 0.3 < float(swapped.mean()) < 0.7
    assert (swapped >= 0).all()


def test_a_small_bank_tells_nothing_and_neither_does_a_batch_of_one_pair():
    audio, text, _ = clustered_bank(clusters=4, rows=64, spread=0.1)
    small = pair_reliability(batch_of(audio[:3], text[:3]), 3, bank_of(audio[:31], text[:31]), rank=32, shape=3.0)
    assert small.tolist() == [UNKNOWN] * 3 == [-1.0] * 3
    alone = pair_reliability(batch_of(audio[:1], text[:1]), 1, bank_of(audio, text), rank=32, shape=3.0)
    assert alone.tolist() == [UNKNOWN]


def test_reliability_has_no_gradient():
    audio, text, _ = clustered_bank(clusters=4, rows=64, spread=0.1)
    batch = batch_of(audio[:3].clone().requires_grad_(), text[:3])
    assert not pair_reliability(batch, 3, bank_of(audio, text), rank=32, shape=3.0).requires_grad


def test_the_running_mean_by_hand():
    now, before = torch.tensor([0.2, 0.2, UNKNOWN, UNKNOWN]), torch.tensor([0.6, UNKNOWN, 0.6, UNKNOWN])
    torch.testing.assert_close(running_reliability(now, before, 0.75), torch.tensor([0.5, 0.2, 0.6, -1.0]))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_the_share_of_wrong_pairs_is_estimated_from_their_uniform_reliability(share):
    generator = torch.Generator().manual_seed(2)
    r = torch.where(torch.rand(20_000, generator=generator) < share, torch.rand(20_000, generator=generator), 1.0)
    r[::7] = UNKNOWN
    assert float(wrong_share(r)) == pytest.approx(share, abs=0.02)


def test_nothing_known_means_no_wrong_pairs_and_the_share_stays_below_1():
    assert wrong_share(torch.full((4,), UNKNOWN)) == 0.0
    assert wrong_share(torch.zeros(0)) == 0.0
    assert wrong_share(torch.zeros(5)) == 1.0


def test_weights_by_hand():
    weights = reliability_weights(torch.tensor([0.5, 1.0, 0.0, UNKNOWN]), gamma=2.0)
    assert weights.tolist() == [0.25, 1.0, 0.0, 1.0]


def test_gamma_0_weighs_all_alike():
    assert reliability_weights(torch.tensor([0.0, 0.3, 1.0]), torch.tensor(0.0)).tolist() == [1.0, 1.0, 1.0]
