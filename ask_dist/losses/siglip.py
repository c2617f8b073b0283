"""The pairwise sigmoid loss, a baseline and an alternative to InfoNCE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def siglip(logits: Tensor, allowed: Tensor, target: Tensor) -> Tensor:
    """Sigmoid loss (Zhai et al. 2023, equation 1) of each audio row against all texts, in nats.

    Every pair of a row and a column is a yes-or-no question, so audio rows alone ask them all: there is no second
    direction to add.

    Args:
        logits: float [local, global], already scaled, bias added.
        allowed: bool [local, global], see `contrast_masks`.
        target: int64 [local].

    Returns:
        float [local].
    """
    right = torch.zeros_like(allowed).scatter_(1, target.unsqueeze(1), True)
    answers = logsigmoid(torch.where(right, logits, -logits))
    return -torch.where(allowed, answers, torch.zeros_like(answers)).sum(dim=1)
