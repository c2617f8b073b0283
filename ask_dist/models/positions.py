"""Positions for encoders that take any length."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """Sinusoidal positions (Vaswani et al. 2017, section 3.5): [length, width] with the device and dtype of `like`.

    Sines in the first half, cosines in the second; an odd width has one cosine fewer.
    """
    position = torch.arange(length, device=like.device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / width))
    return torch.cat([(position * rate).sin(), (position * rate).cos()], dim=1)[:, :width].to(like.dtype)
