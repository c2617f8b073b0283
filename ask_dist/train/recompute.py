"""Activation checkpointing: blocks that keep their inputs alone and are computed again in the backward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ask_dist.train.parameters import encoders


def recompute_blocks(model: nn.Module) -> None:
    """Makes every block of a model's encoders compute its activations again in the backward pass (Chen et al. 2016).

    Gradients stay what they were, dropout included: the generators' states are kept with the inputs. So do the names of
    parameters.
    """
    for encoder in encoders(model).values():
        for block in encoder.tower_blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
