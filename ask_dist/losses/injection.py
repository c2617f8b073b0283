"""Knowledge from beyond the batch: what it is for the loss, and the terms that inject it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """Rows of the bank near to the batch, the batch's own stored rows, and prototypes of the whole bank.

    None of it has a gradient.

    Attributes:
        ids: int64 [rows], none of them this rank's.
        audio, text: float32 [rows, dim], unit rows, paired; zeros for the audio of a row that is a text alone.
        age: float32 [rows], global steps since the row was last right (encoded or refined).
        own_audio, own_text: float32 [local, dim], what the bank holds of this rank's own pairs.
        own_age: float32 [local]; -1 where the bank does not hold the pair.
        own_reliability: float32 [local], running mean; -1 where it is not known.
        reliability: float32 [rows], the same of the rows.
        prototypes: pairs of float32 [p, dim] (audio, text), one a granularity; may be empty.
    """

    ids: Tensor
    audio: Tensor
    text: Tensor
    age: Tensor
    own_audio: Tensor
    own_text: Tensor
    own_age: Tensor
    own_reliability: Tensor
    reliability: Tensor
    prototypes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def paired(self) -> Neighbours:
        """Without the rows that are a text alone: what may be compared by audio."""
        both = self.audio.norm(dim=1) != 0  # what is no number counts: it shows in the loss, and the step is left out
        if both.all():
            return self
        rows = {name: getattr(self, name)[both] for name in ("ids", "audio", "text", "age", "reliability")}
        return replace(self, **rows)

    def without_own(self, rows: Tensor) -> Neighbours:
        """The same, but the bank holds nothing of these of the rank's own pairs: bool [local]."""
        return replace(self, own_age=self.own_age.masked_fill(rows, -1.0))

    @classmethod
    def of(cls, answer: Any, prototypes: Any = None, device: torch.device | str = "cpu") -> Neighbours:
        """The bank's answer (`bank.messages.Knowledge`) and its prototypes (`bank.prototypes.Prototypes`) as tensors.

        They are copied: what comes through Ray is a read-only view of shared memory.
        """

        def floats(array: Any) -> Tensor:
            return torch.tensor(array, dtype=torch.float32, device=device)

        named = {name.name: floats(getattr(answer, name.name)) for name in fields(cls)[1:-1]}
        levels = [(floats(audio), floats(text)) for audio, text in prototypes.levels] if prototypes else []
        return cls(torch.tensor(answer.ids, device=device), **named, prototypes=levels)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each row (Lin 1991, equation 3.8), in nats, between 0 and ln 2.

    Args:
        log_p, log_q: float [..., rows, outcomes], log-probabilities.

    Returns:
        float [..., rows].
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * terms.sum(dim=-1)


def similarities(audio_features: Tensor, text_features: Tensor, sets: Sequence[Tensor]) -> list[Tensor]:
    """The inner products of both halves of the pairs with the same rows, a product for each set of rows.

    Args:
        audio_features, text_features: float [local, dim].
        sets: float [rows, dim] each.

    Returns:
        float [2 local, rows] each, those of the audio first.
    """
    halves = torch.cat([audio_features, text_features])
    return [halves @ rows.T for rows in sets]


def bank_contrast(
    features: Tensor, own: Tensor, products: Tensor, neighbours: Neighbours, scale: Tensor, half_life: float
) -> Tensor:
    """InfoNCE of each query against the bank alone, fine granularity: its own stored row against the others.

    The right answer comes from the bank too. A fresh one would differ from all the others in its age, and telling young
    rows from old ones is easier than telling sounds apart: the encoders would learn to drift (docs/method.md).
    A row that is older than the own one by `half_life` counts half.

    Args:
        features: float [local, dim], queries with gradient.
        own: float [local, dim], the stored other half of each query's pair.
        products: float [local, rows], of the queries with the other modality's half of these neighbours.
        half_life: global steps.

    Returns:
        float [local] in nats; meaningless where `own_age` is -1.
    """
    positive = scale * (features * own).sum(dim=1)
    older = (neighbours.age - neighbours.own_age.unsqueeze(1)).clamp(min=0.0)
    negatives = scale * products - older * (math.log(2.0) / half_life)
    return torch.cat([positive.unsqueeze(1), negatives], dim=1).logsumexp(dim=1) - positive


def consistency(products: Sequence[Tensor], temperature: float) -> Tensor:
    """How far the halves of a pair disagree about the bank: the mean of their divergences over several sets of rows.

    Args:
        products: `similarities` with each set: the texts and the audio of neighbours (fine) or prototypes (coarse).
        temperature: of the softmax distributions.

    Returns:
        float [local], nats in [0, ln 2].
    """
    alike: dict[int, list[Tensor]] = {}
    for one in products:  # sets of as many rows are compared at once: the tensors are small, each operation counts
        alike.setdefault(one.shape[1], []).append(one)
    logs = ((torch.stack(group) / temperature).log_softmax(dim=-1).chunk(2, dim=1) for group in alike.values())
    return torch.cat([jensen_shannon(by_audio, by_text) for by_audio, by_text in logs]).mean(dim=0)
