"""Knowledge from beyond the batch: what it is for the loss, and the terms that inject it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ask_dist.losses.gather import GlobalBatch
from ask_dist.losses.reliability import jensen_shannon


@dataclass(frozen=True)
class Neighbours:
    """Rows of the bank near to the batch, and prototypes of the whole bank; none of it has a gradient.

    Attributes:
        ids: int64 [rows].
        audio, text: float32 [rows, dim], unit rows, paired.
        age: float32 [rows], global steps since the row was last right (encoded or refined).
        prototypes: pairs of float32 [p, dim] (audio, text), one a granularity; may be empty.
    """

    ids: Tensor
    audio: Tensor
    text: Tensor
    age: Tensor
    prototypes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def extra_logits(
    features: Tensor, rows: Tensor, neighbours: Neighbours, batch: GlobalBatch, scale: Tensor, half_life: float
) -> Tensor:
    """Scaled logits of the bank's rows as further negatives, fine granularity.

    A row of age `half_life` counts half. Rows that are in the global batch are there already, fresh: they do not count.

    Args:
        features: float [local, dim]; rows: float [rows, dim], the other modality.
        half_life: global steps.

    Returns:
        float [local, rows].
    """
    fade = neighbours.age * (-math.log(2.0) / half_life)
    fade = fade.masked_fill(torch.isin(neighbours.ids, batch.ids), float("-inf"))
    return scale * (features @ rows.T) + fade


def consistency(
    audio_features: Tensor, text_features: Tensor, bank_audio: Tensor, bank_text: Tensor, temperature: float
) -> Tensor:
    """How far the two halves of a pair disagree about the bank: mean of the divergences over its text and its audio.

    Args:
        audio_features, text_features: float [local, dim].
        bank_audio, bank_text: float [rows, dim], neighbours (fine) or prototypes (coarse).
        temperature: of the four softmax distributions.

    Returns:
        float [local], nats in [0, ln 2].
    """
    total = torch.zeros(len(audio_features), device=audio_features.device)
    for rows in (bank_text, bank_audio):
        by_audio = (audio_features @ rows.T / temperature).log_softmax(dim=1)
        by_text = (text_features @ rows.T / temperature).log_softmax(dim=1)
        total = total + jensen_shannon(by_audio, by_text)
    return total / 2
