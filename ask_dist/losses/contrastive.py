"""Contrast in the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ask_dist.losses.gather import GlobalBatch


def contrast_masks(batch: GlobalBatch, local: int) -> tuple[Tensor, Tensor]:
    """Which columns a local row is compared with, and which of them is its own.

    Args:
        batch: the global batch.
        local: number of rows of this rank.

    Returns:
        allowed: bool [local, global]; False for empty slots and for further rows with the same id, no negatives.
        target: int64 [local], column of the row itself.
    """
    target = torch.arange(batch.offset, batch.offset + local, device=batch.ids.device)
    own = target.unsqueeze(1) == torch.arange(len(batch.ids), device=batch.ids.device)
    same = batch.ids[target].unsqueeze(1) == batch.ids
    return own | (batch.valid & ~same), target


def info_nce(logits: Tensor, allowed: Tensor, target: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, equation 4) of each row, in nats.

    Args:
        logits: float [local, global], already scaled.
        allowed: bool [local, global], see `contrast_masks`.
        target: int64 [local].

    Returns:
        float [local].
    """
    logits = logits.masked_fill(~allowed, float("-inf"))
    positive = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    return logits.logsumexp(dim=1) - positive


def weighted_mean(per_row: Tensor, weights: Tensor, batch: GlobalBatch) -> Tensor:
    """Mean over the valid rows of the *global* batch, as a loss for this rank.

    Data-parallel engines average gradients over ranks; the factor world_size turns that average into the sum, so that
    ranks with fewer valid rows do not weigh more.

    Args:
        per_row: float [local].
        weights: float [local].
        batch: the global batch.
    """
    valid = batch.valid[batch.offset : batch.offset + len(per_row)]
    total = torch.where(valid, weights * per_row, torch.zeros_like(per_row)).sum()
    return batch.world_size * total / batch.valid.sum().clamp(min=1)
