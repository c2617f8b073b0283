"""Cross-batch memory: the last embeddings, as they were, as further negatives. A baseline."""

from __future__ import annotations

import torch
from torch import Tensor


class CrossBatchMemory:
    """XBM (Wang et al. 2020): a first-in-first-out memory of both modalities.

    Args:
        dim: width of an embedding.
        capacity: pairs that it holds.
    """

    def __init__(self, dim: int, capacity: int) -> None:
        self._ids = torch.full((capacity,), -1)
        self._audio, self._text = torch.zeros(capacity, dim), torch.zeros(capacity, dim)
        self._next, self._count = 0, 0

    def push(self, ids: Tensor, audio: Tensor, text: Tensor) -> None:
        """Replaces the oldest pairs by a batch: ids int64 [n], embeddings float [n, dim]."""
        at = (self._next + torch.arange(len(ids))) % len(self._ids)
        self._ids[at], self._audio[at], self._text[at] = ids, audio.detach(), text.detach()
        self._next = (self._next + len(ids)) % len(self._ids)
        self._count = min(self._count + len(ids), len(self._ids))

    def loss(self, ids: Tensor, audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """Symmetric InfoNCE of each pair, float [n], against the batch and the memory; pairs of the batch that lie in
        the memory too do not count twice."""
        twice = torch.isin(self._ids[: self._count], ids)
        target = torch.arange(len(ids))
        total = torch.zeros(len(ids))
        for queries, keys, memory in ((audio, text, self._text), (text, audio, self._audio)):
            rows = memory[: self._count].clone()  # the backward pass needs them as they were before the next push
            far = (scale * queries @ rows.T).masked_fill(twice, float("-inf"))
            logits = torch.cat([scale * queries @ keys.T, far], dim=1)
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return total / 2
