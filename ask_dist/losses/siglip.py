"""The pairwise sigmoid loss, an alternative to InfoNCE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ask_dist.losses.contrastive import by_blocks, contrast_masks
from ask_dist.losses.gather import GlobalBatch


def siglip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor | float, batch: GlobalBatch) -> Tensor:
    """Sigmoid loss (Zhai et al. 2023, equation 1) of each local row, in nats.

    Every pair of a row and a column is a yes-or-no question, so the rows of one modality ask them all: there is no
    second direction to add.

    Args:
        queries: float [local, dim], rows of one modality.
        keys: float [global, dim], rows of the other: of the global batch.
        scale: scalar, multiplies the products of rows.
        bias: scalar, added to them.
        batch: the global batch, which tells the rows that are no negatives.

    Returns:
        float [local], the sum over the columns that a row is compared with.
    """

    def block(columns: slice, queries: Tensor, keys: Tensor) -> Tensor:
        logits = queries @ keys.T + bias
        allowed, own = contrast_masks(batch, len(queries), columns)
        answers = logsigmoid(torch.where(own, logits, -logits))
        return -torch.where(allowed, answers, torch.zeros_like(answers)).sum(dim=1)

    return torch.stack(by_blocks(block, scale * queries, keys, batch)).sum(dim=0)
