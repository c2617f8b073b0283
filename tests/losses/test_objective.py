"""The whole objective against a slow loop, its gates, and its behaviour at the edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ask_dist.config import BatchLoss, Knowledge, Reliability
from ask_dist.losses.injection import Neighbours
from ask_dist.losses.objective import AskObjective, ObjectiveOutput

HALF_LIFE, BIAS = 10.0, -2.0
IDS = torch.tensor([1, 2, 3, 2, 5, 6])
VALID = torch.tensor([True, True, True, True, False, True])
ALWAYS = Reliability(start=0.0, rank=4)


def unit(rows: int, seed: int, dim: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def bank_rows(rows: int = 12, local: int = 6) -> Neighbours:
    """The bank holds all pairs of the batch but the last."""
    own_age = torch.tensor([float(place) for place in range(local)])
    own_age[-1] = -1.0
    ids, age = torch.arange(100, 100 + rows), torch.arange(float(rows))
    own = (unit(local, 8), unit(local, 9), own_age, torch.linspace(0.5, 1.0, local))
    return Neighbours(
        ids, unit(rows, 1), unit(rows, 2), age, *own, torch.linspace(0.6, 1.0, rows), [(unit(3, 3), unit(3, 4))]
    )


def with_texts_alone(known: Neighbours, count: int) -> Neighbours:
    """The first rows lose their audio, and their pairs were never measured."""
    audio, reliability = known.audio.clone(), known.reliability.clone()
    audio[:count], reliability[:count] = 0.0, -1.0
    return replace(known, audio=audio, reliability=reliability)


def run(
    knowledge: Knowledge, neighbours: Neighbours | None, loss: BatchLoss = "info_nce", **arguments: Any
) -> ObjectiveOutput:
    objective = AskObjective(knowledge, HALF_LIFE, loss)
    return objective(unit(6, 5), unit(6, 6), torch.tensor(4.0), BIAS, IDS, VALID, neighbours, **arguments)


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def divergence(p: list[float], q: list[float]) -> float:
    total = 0.0
    for x in (p, q):
        total += sum(a * math.log(2 * a / (b + c)) for a, b, c in zip(x, p, q, strict=True) if a > 0) / 2
    return total


def agreement(
    query_a: Tensor, query_t: Tensor, audio: Sequence[Tensor], text: Sequence[Tensor], temperature: float
) -> float:
    parts = []
    for rows in (audio, text):
        by_query = [softmax([float(query @ row) / temperature for row in rows]) for query in (query_a, query_t)]
        parts.append(divergence(*by_query))
    return sum(parts) / 2


def slow_weights(trust: Reliability, known: Neighbours) -> list[float]:
    """r^(gamma x share x (1 - share)) of the running mean, from the measured r of this step."""
    now = run(Knowledge(reliability=trust), replace(known, own_reliability=torch.full((6,), -1.0))).reliability
    mean = [
        trust.momentum * float(b) + (1 - trust.momentum) * float(r)
        for b, r in zip(known.own_reliability, now, strict=True)
    ]
    measured = [float(r) for r in known.reliability if r >= 0]
    share = 2 * sum(1 - r for r in measured) / len(measured)
    return [r ** (trust.gamma * share * (1 - share)) for r in mean]


def slow_loss(
    knowledge: Knowledge, known: Neighbours, loss: BatchLoss = "info_nce", scale: float = 4.0
) -> dict[str, float]:
    """The objective with every gate open, pair by pair."""
    audio, text = unit(6, 5), unit(6, 6)
    rows = [i for i in range(6) if VALID[i]]
    weights = slow_weights(knowledge.reliability, known)

    def in_batch(i: int, queries: Tensor, keys: Tensor) -> float:
        others = [j for j in range(6) if VALID[j] and IDS[j] != IDS[i]]
        positive, *negatives = (scale * float(queries[i] @ keys[j]) for j in (i, *others))
        if loss == "siglip":
            questions = [-(positive + BIAS), *(negative + BIAS for negative in negatives)]
            return sum(math.log(1 + math.exp(question)) for question in questions)
        return math.log(sum(math.exp(logit) for logit in (positive, *negatives))) - positive

    def against_bank(i: int, queries: Tensor, own: Tensor, bank: Tensor) -> float:
        stored = scale * float(queries[i] @ own[i])
        outside = sum(
            0.5 ** (max(0.0, float(known.age[j] - known.own_age[i])) / HALF_LIFE)
            * math.exp(scale * float(queries[i] @ bank[j]))
            for j in range(len(known))
            if bank[j].any()  # a text alone is nothing that a text could be compared with
        )
        return math.log(math.exp(stored) + outside) - stored

    def contrast(i: int) -> float:
        plain = in_batch(i, audio, text)
        if loss == "info_nce":  # the sigmoid loss asks for every pair once
            plain = (plain + in_batch(i, text, audio)) / 2
        if known.own_age[i] < 0:
            return plain
        wide = against_bank(i, audio, known.own_text, known.text) + against_bank(i, text, known.own_audio, known.audio)
        return (1 - knowledge.contrast_weight) * plain + knowledge.contrast_weight * wide / 2

    terms = {"contrast": 0.0, "consistency": 0.0, "coarse": 0.0}
    (coarse_audio, coarse_text), temperature = known.prototypes[0], knowledge.temperature
    for i in rows:
        terms["contrast"] += weights[i] * contrast(i) / len(rows)
        heard = [row for row in known.audio if row.any()]
        fine = agreement(audio[i], text[i], heard, known.text, temperature)
        terms["consistency"] += knowledge.consistency_weight * weights[i] * fine / len(rows)
        coarse = agreement(audio[i], text[i], coarse_audio, coarse_text, temperature)
        terms["coarse"] += knowledge.coarse_weight * weights[i] * coarse / len(rows)
    return terms


@pytest.mark.parametrize("contrast_weight", [1.0, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("texts", [0, 5])
@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_agrees_with_a_loop_over_pairs(loss, contrast_weight, gamma, texts):
    trust = Reliability(start=0.0, rank=4, gamma=gamma)
    knowledge = Knowledge(start=0.0, temperature=0.2, contrast_weight=contrast_weight, reliability=trust)
    known = with_texts_alone(bank_rows(), texts)
    output, wanted = run(knowledge, known, loss), slow_loss(knowledge, known, loss)
    assert output.knowledge_used
    assert {name: float(term) for name, term in output.terms.items()} == pytest.approx(wanted, rel=1e-6)
    assert output.loss.item() == pytest.approx(sum(wanted.values()), rel=1e-6)


def test_reliability_is_told_for_every_local_pair():
    reliability = run(Knowledge(reliability=ALWAYS), bank_rows()).reliability
    assert reliability.shape == (6,)
    assert ((reliability >= 0) & (reliability <= 1)).all()
    assert run(Knowledge(reliability=ALWAYS), None).reliability.tolist() == [-1.0] * 6
    fewer_rows_than_rank = replace(bank_rows(31), own_reliability=torch.full((6,), -1.0))
    assert run(Knowledge(), fewer_rows_than_rank).reliability.tolist() == [-1.0] * 6


def test_texts_alone_have_no_say_in_what_is_compared_by_audio():
    known = with_texts_alone(bank_rows(), 5)
    assert len(known.paired) == 7
    knowledge = Knowledge(start=0.0, reliability=ALWAYS)
    assert run(knowledge, known).reliability.equal(run(knowledge, known.paired).reliability)
    output = run(knowledge, with_texts_alone(bank_rows(), 12))
    assert torch.isfinite(output.loss)
    assert output.knowledge_used
    assert (output.reliability == bank_rows().own_reliability).all()  # too few rows to tell: what was known before


def test_encoders_that_make_every_pair_look_wrong_leave_all_pairs_their_weight():
    trust = Reliability(start=0.0, rank=4, gamma=50.0)
    only_weights = Knowledge(start=1.0, reliability=trust)
    untrained = replace(bank_rows(), own_reliability=torch.full((6,), 0.5), reliability=torch.full((12,), 0.5))
    assert run(only_weights, untrained, progress=0.5).loss.item() == pytest.approx(plain_loss())
    mixed = replace(untrained, reliability=torch.tensor([0.5] * 6 + [1.0] * 6))
    assert run(only_weights, mixed, progress=0.5).loss.item() < 0.1 * plain_loss()


def plain_loss(loss: BatchLoss = "info_nce") -> float:
    return run(Knowledge(enabled=False), None, loss).loss.item()


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
@pytest.mark.parametrize("neighbours", [None, bank_rows(0)], ids=["late", "empty"])
def test_without_an_answer_the_loss_is_the_plain_one_exactly(loss, neighbours):
    output = run(Knowledge(start=0.0, reliability=ALWAYS), neighbours, loss)
    assert output.loss.item() == plain_loss(loss)
    assert list(output.terms) == ["contrast"]
    assert not output.knowledge_used


def test_before_its_gates_the_loss_is_the_plain_one_exactly():
    knowledge = Knowledge(start=0.5, reliability=Reliability(start=0.4, rank=4))
    assert run(knowledge, bank_rows(), progress=0.3999).loss.item() == plain_loss()
    assert not run(knowledge, bank_rows(), progress=0.3999).knowledge_used


def test_each_gate_opens_at_its_own_share():
    knowledge = Knowledge(start=0.5, reliability=Reliability(start=0.4, rank=4))
    weighted = run(knowledge, bank_rows(), progress=0.4)
    assert list(weighted.terms) == ["contrast"]
    assert weighted.loss.item() != plain_loss()
    assert list(run(knowledge, bank_rows(), progress=0.5).terms) == ["contrast", "consistency", "coarse"]


def test_switched_off_knowledge_leaves_the_plain_loss_whatever_the_bank_says():
    output = run(Knowledge(enabled=False, start=0.0, reliability=ALWAYS), bank_rows())
    assert output.loss.item() == plain_loss()
    assert not output.knowledge_used


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"consistency_weight": 0.0}, ["contrast", "coarse"]),
        ({"coarse_weight": 0.0}, ["contrast", "consistency"]),
        ({"consistency_weight": 0.0, "coarse_weight": 0.0}, ["contrast"]),
    ],
)
def test_a_weight_of_zero_leaves_its_term_out(settings, names):
    assert list(run(Knowledge(start=0.0, **settings), bank_rows()).terms) == names


def test_a_bank_without_prototypes_has_no_coarse_term():
    known = bank_rows()
    without = replace(known, prototypes=[])
    assert list(run(Knowledge(start=0.0), without).terms) == ["contrast", "consistency"]


def test_contrast_weight_0_ignores_the_banks_rows_as_negatives():
    trust = Reliability(enabled=False)
    knowledge = Knowledge(start=0.0, contrast_weight=0, consistency_weight=0, coarse_weight=0, reliability=trust)
    assert run(knowledge, bank_rows()).loss.item() == plain_loss()


def test_gradients_are_finite_and_none_comes_from_an_invalid_row():
    audio, text = unit(6, 5).requires_grad_(), unit(6, 6).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    objective = AskObjective(Knowledge(start=0.0, reliability=ALWAYS))
    objective(audio, text, scale, 0.0, IDS, VALID, bank_rows()).loss.backward()
    for gradient in (audio.grad, text.grad, scale.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
    for gradient in (audio.grad, text.grad):
        assert (gradient[~VALID] == 0).all()
        assert (gradient[VALID].norm(dim=1) > 0).all()


def test_the_bank_gets_no_gradient_and_reaches_beyond_the_batch():
    audio, text = unit(3, 5, dim=16).requires_grad_(), unit(3, 6, dim=16)
    own = (unit(3, 8, dim=16), unit(3, 9, dim=16), torch.zeros(3), torch.ones(3))
    rows = (unit(12, 1, dim=16), unit(12, 2, dim=16), torch.zeros(12))
    known = Neighbours(torch.arange(100, 112), *rows, *own, torch.ones(12))
    span = torch.linalg.qr(torch.cat([audio.detach(), text]).T).Q

    def outside(neighbours: Neighbours | None) -> float:
        (gradient,) = torch.autograd.grad(
            AskObjective(Knowledge(start=0.0, contrast_weight=1.0))(
                audio, text, torch.tensor(4.0), 0.0, IDS[:3], None, neighbours
            ).loss,
            audio,
        )
        return float((gradient - gradient @ span @ span.T).norm() / gradient.norm())

    assert outside(None) < 1e-6  # the gradient locality bottleneck
    assert outside(known) > 0.1
    assert not known.audio.requires_grad


def test_a_batch_of_invalid_rows_alone_costs_nothing():
    audio = unit(2, 5).requires_grad_()
    none = torch.zeros(2, dtype=torch.bool)
    loss = AskObjective(Knowledge(start=0.0))(
        audio, unit(2, 6), torch.tensor(4.0), 0.0, IDS[:2], none, bank_rows(local=2)
    ).loss
    loss.backward()
    assert loss.item() == 0.0
    assert (audio.grad == 0).all()


def test_a_mixed_row_is_not_judged_and_nothing_of_the_bank_is_its_own():
    mixed = torch.tensor([True, False, False, False, False, False])
    known = bank_rows()
    output = run(Knowledge(reliability=ALWAYS, start=0.0), known, mixed=mixed)
    plain = run(Knowledge(reliability=ALWAYS, start=0.0), known)
    assert output.reliability[0] == -1
    torch.testing.assert_close(output.reliability[1:], plain.reliability[1:])
    assert not torch.isclose(output.loss, plain.loss)
    # Whatever the bank holds of the pair that the row stands in place of says nothing.
    other = replace(known, own_audio=known.own_audio.clone(), own_reliability=known.own_reliability.clone())
    other.own_audio[0], other.own_reliability[0] = -known.own_audio[0], 0.1
    assert torch.equal(run(Knowledge(reliability=ALWAYS, start=0.0), other, mixed=mixed).loss, output.loss)
    assert not torch.equal(run(Knowledge(reliability=ALWAYS, start=0.0), other).loss, plain.loss)
