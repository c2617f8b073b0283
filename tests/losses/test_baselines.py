"""The baselines' losses against slow loops, and GradCache against one backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ask_dist.losses.cross_batch import CrossBatchMemory
from ask_dist.losses.global_contrast import GlobalContrast
from ask_dist.losses.grad_cache import GradCache


def unit(rows: int, seed: int, dim: int = 8) -> Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def symmetric_info_nce(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, target = scale * audio @ text.T, torch.arange(len(audio))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def test_an_empty_memory_adds_nothing_and_a_full_one_forgets_the_oldest():
    memory, scale, ids = CrossBatchMemory(8, capacity=4), torch.tensor(5.0), torch.arange(2)
    audio, text = unit(2, 0), unit(2, 1)
    alone = memory.loss(ids, audio, text, scale)
    torch.testing.assert_close(alone.mean(), symmetric_info_nce(audio, text, scale))
    for first in (10, 20, 30):  # the first of these is forgotten
        memory.push(torch.arange(first, first + 2), unit(2, first), unit(2, first + 1))
    kept_audio, kept_text = (torch.cat([unit(2, 20 + side), unit(2, 30 + side)]) for side in (0, 1))
    wanted = torch.zeros(2)
    for queries, keys, kept in ((audio, text, kept_text), (text, audio, kept_audio)):
        logits = scale * torch.cat([queries @ keys.T, queries @ kept.T], dim=1)
        wanted += cross_entropy(logits, torch.arange(2), reduction="none") / 2
    torch.testing.assert_close(memory.loss(ids, audio, text, scale), wanted)


def test_a_pair_of_the_batch_that_lies_in_the_memory_is_no_negative():
    memory, audio, text = CrossBatchMemory(8, capacity=4), unit(2, 0), unit(2, 1)
    memory.push(torch.arange(2), audio, text)
    loss = memory.loss(torch.arange(2), audio, text, torch.tensor(5.0))
    torch.testing.assert_close(loss.mean(), symmetric_info_nce(audio, text, torch.tensor(5.0)))


def test_with_the_newest_value_alone_global_contrast_has_the_gradient_of_the_mean_over_other_pairs():
    """momentum 1: u is this batch's own g, so grad g / u is grad log g, InfoNCE's without its own term below."""
    audio, text, scale = unit(5, 0).requires_grad_(), unit(5, 1), torch.tensor(4.0)
    GlobalContrast(9, momentum=1.0).loss(torch.arange(5), audio, text, scale).sum().backward()
    again = audio.detach().requires_grad_()
    logits = scale * again @ text.T
    away = logits.masked_fill(torch.eye(5, dtype=torch.bool), float("-inf"))
    own = logits.diagonal()
    ((away.logsumexp(1) - own + away.logsumexp(0) - own) / 2).sum().backward()
    torch.testing.assert_close(audio.grad, again.grad, atol=1e-5, rtol=1e-4)


def test_global_contrast_remembers_each_pairs_denominator():
    loss, ids, scale = GlobalContrast(4, momentum=0.5), torch.arange(3), torch.tensor(3.0)
    first = loss.loss(ids, unit(3, 0), unit(3, 1), scale)
    torch.testing.assert_close(first, torch.ones(3))  # g / u with u = g
    second = loss.loss(ids, unit(3, 2), unit(3, 3), scale)
    assert not torch.allclose(second, torch.ones(3))


class Towers(nn.Module):
    """With dropout, so that the second embedding must repeat the first one's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.text = (nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor([3.0]))

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return normalize(self.audio(audio), dim=1), normalize(self.text(text), dim=1), self.scale[0]


@pytest.mark.parametrize("micro_batch_size", [3, 5, 12])
def test_grad_cache_has_the_gradients_of_the_whole_batch(micro_batch_size):
    inputs = (torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), unit(12, 2, dim=6))

    cached, whole = Towers(), Towers()
    chunks = GradCache(cached, inputs, micro_batch_size, seed=7)
    found = symmetric_info_nce(*chunks.features)
    found.backward()
    calls = []
    chunks.backward(lambda loss, last: (loss.backward(), calls.append(last)))
    parts = []
    for number, chunk in enumerate(zip(*(part.split(micro_batch_size) for part in inputs), strict=True)):
        torch.manual_seed(7 + number)
        parts.append(whole(*chunk))
    audio, text, scales = zip(*parts, strict=True)
    wanted = symmetric_info_nce(torch.cat(audio), torch.cat(text), scales[0])
    wanted.backward()
    assert calls == [False] * (len(parts) - 1) + [True]
    torch.testing.assert_close(found.detach(), wanted.detach())
    for ours, reference in zip(cached.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, atol=1e-6, rtol=1e-5)
