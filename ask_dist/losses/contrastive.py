"""Contrast in the global batch, a block of columns at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ask_dist.losses.gather import GlobalBatch

Block = TypeVar("Block")


def column_blocks(batch: GlobalBatch, local: int) -> list[slice]:
    """The columns of the global batch, those of one rank at a time; this rank's own come first.

    Args:
        batch: the global batch, `local` rows of every rank.
        local: number of rows of this rank.
    """
    columns = len(batch.ids)
    starts = (first % columns for first in range(batch.offset, batch.offset + columns, local))
    return [slice(start, start + local) for start in starts]


def contrast_masks(batch: GlobalBatch, local: int, columns: slice) -> tuple[Tensor, Tensor]:
    """Which of some columns a local row is compared with, and which of them is its own.

    Args:
        batch: the global batch.
        local: number of rows of this rank.
        columns: of the global batch, see `column_blocks`.

    Returns:
        allowed: bool [local, columns]; False for empty slots and for further rows with the same id, no negatives.
        own: bool [local, columns]; True where the column is the row itself.
    """
    places = torch.arange(len(batch.ids), device=batch.ids.device)
    rows = slice(batch.offset, batch.offset + local)
    own = places[rows].unsqueeze(1) == places[columns]
    same = batch.ids[rows].unsqueeze(1) == batch.ids[columns]
    return own | (batch.valid[columns] & ~same), own


def by_blocks(
    block: Callable[[slice, Tensor, Tensor], Block], queries: Tensor, keys: Tensor, batch: GlobalBatch
) -> list[Block]:
    """What `block` gives for each of `column_blocks`, in their order.

    A rank that held its logits against the global batch would need memory in proportion to the number of ranks. So
    where there are several blocks, each is computed again in the backward pass, and one alone exists at a time.

    Args:
        block: takes columns, queries and these columns' keys.
        queries: float [local, dim].
        keys: float [global, dim].
        batch: the global batch.
    """
    blocks, parts = column_blocks(batch, len(queries)), keys.split(len(queries))
    if len(blocks) == 1:
        return [block(blocks[0], queries, keys)]
    return [
        checkpoint(
            block, columns, queries, parts[columns.start // len(queries)], use_reentrant=False, preserve_rng_state=False
        )
        for columns in blocks
    ]


def info_nce(queries: Tensor, keys: Tensor, scale: Tensor, batch: GlobalBatch) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, equation 4) of each local row, in nats.

    Args:
        queries: float [local, dim], rows of one modality.
        keys: float [global, dim], rows of the other: of the global batch.
        scale: scalar, multiplies the products of rows.
        batch: the global batch, which tells the rows that are no negatives.

    Returns:
        float [local].
    """

    def block(columns: slice, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        logits = queries @ keys.T
        allowed, _ = contrast_masks(batch, len(queries), columns)
        # Finite, because a row may have no column in a block, and minus infinity less itself is no number.
        kept = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        return kept.logsumexp(dim=1), logits.diagonal().clone()

    totals, diagonals = zip(*by_blocks(block, scale * queries, keys, batch), strict=True)
    return torch.stack(totals).logsumexp(dim=0) - diagonals[0]  # the first block holds the rows' own columns


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
