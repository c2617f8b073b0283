"""A global contrastive loss without a bank: each pair remembers how large its denominator was. A baseline."""

from __future__ import annotations

import torch
from torch import Tensor


class GlobalContrast:
    """SogCLR (Yuan et al. 2022, algorithm 1) with the learned scale of FastCLIP (Wei et al. 2024).

    For each pair and direction a running mean u of g = mean_j exp(s (a.t_j - a.t)) stands for the denominator over the
    whole corpus, and the gradient of log u is estimated by grad g / u.

    Args:
        pairs: of the corpus; ids run from 0 to pairs - 1.
        momentum: weight of the newest g in the mean (gamma in SogCLR).
    """

    def __init__(self, pairs: int, momentum: float) -> None:
        self._mean = torch.zeros(2, pairs)
        self._momentum = momentum

    def loss(self, ids: Tensor, audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """float [n] whose *gradient* is the estimate; its value is about 1 a direction.

        Args:
            ids: int64 [n]. audio, text: float [n, dim], unit rows, paired. scale: scalar, exponentiated.
        """
        similarity = audio @ text.T
        others = ~torch.eye(len(ids), dtype=torch.bool)
        total = torch.zeros(len(ids))
        for direction, rows in enumerate((similarity, similarity.T)):
            gaps = (scale * (rows - rows.diagonal().unsqueeze(1))).exp()
            now = (gaps * others).sum(dim=1) / (len(ids) - 1)
            old = self._mean[direction, ids]
            mean = torch.where(old > 0, (1 - self._momentum) * old + self._momentum * now.detach(), now.detach())
            self._mean[direction, ids] = mean
            total = total + now / mean.clamp(min=1e-8)
        return total / 2
