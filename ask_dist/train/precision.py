"""What a model computes in: bf16 or fp16 over weights in fp32. Torch alone."""

from __future__ import annotations

import torch
from torch import nn

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compute_in(model: nn.Module, precision: str, device: torch.device) -> None:
    """Makes a model's `forward` compute under torch's autocast: matrix products and convolutions in bf16 or fp16.

    Inside `forward`, not around the call: DeepSpeed switches an autocast off that it finds when it is called. Its own
    would average the gradients of these layers over the ranks in 16 bits, and is a setting of the whole process.

    Args:
        model: its weights, their gradients and what its `forward` takes stay in fp32.
        precision: of `optimization.precision`; nothing changes with fp32.
        device: where the model computes.
    """
    if precision in AUTOCAST:
        model.forward = torch.autocast(device.type, dtype=AUTOCAST[precision])(model.forward)  # type: ignore[method-assign]
