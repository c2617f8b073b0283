"""The global batch, seen from one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient


@dataclass(frozen=True)
class GlobalBatch:
    """Embeddings of all ranks, in rank order; gradients flow back to the rank that a row came from.

    Attributes:
        audio_features, text_features: float32 [global, dim].
        ids: int64 [global]; valid: bool [global], False for slots that padding or a bad sample left empty.
        offset: index of this rank's first row.
        world_size: number of ranks.
    """

    audio_features: Tensor
    text_features: Tensor
    ids: Tensor
    valid: Tensor
    offset: int
    world_size: int


def gather(audio_features: Tensor, text_features: Tensor, ids: Tensor, valid: Tensor) -> GlobalBatch:
    """Collects the batches of all ranks; without torch.distributed, the local batch is the global one.

    Gathering *with* gradient is what makes the averaged gradient of several ranks that of one process over the whole
    batch; without it, only 1/world_size of it arrives and the value of the loss does not tell.

    Args: as `GlobalBatch`, with [local] in place of [global]; every rank must pass the same number of rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return GlobalBatch(audio_features, text_features, ids, valid, 0, 1)
    dim = audio_features.shape[1]
    # One collective for both: on small batches latency counts, not volume.
    everything = torch.cat(tuple(all_gather_with_gradient(torch.cat([audio_features, text_features], dim=1))))
    labels = torch.stack([ids, valid.to(ids.dtype)])
    all_labels = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
    dist.all_gather(all_labels, labels)
    all_ids, all_valid = torch.cat(all_labels, dim=1)
    return GlobalBatch(
        everything[:, :dim],
        everything[:, dim:],
        all_ids,
        all_valid.bool(),
        dist.get_rank() * len(ids),
        dist.get_world_size(),
    )
