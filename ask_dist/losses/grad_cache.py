"""Large batches in little memory: embed in chunks, take the loss over all, embed again for the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Encode = Callable[..., tuple[Tensor, ...]]


def grad_cache(
    encode: Encode, inputs: Sequence[Tensor], loss: Callable[..., Tensor], micro_batch_size: int, seed: int
) -> Tensor:
    """GradCache (Gao et al. 2021): the gradient of one large batch, with the memory of a small one.

    Exact with dropout too: each chunk is embedded twice from the same seed. Costs one more forward pass. Adds to the
    gradients of whatever `encode` and `loss` depend on.

    Args:
        encode: chunks of the inputs -> embeddings, one row an input row.
        inputs: tensors [n, ...], cut alike.
        loss: whole embeddings -> scalar.
        micro_batch_size: rows a chunk.
        seed: of the chunks' dropout.

    Returns:
        The loss, detached.
    """
    chunks = list(zip(*(values.split(micro_batch_size) for values in inputs), strict=True))

    def embed(number: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed + number)
        return encode(*chunks[number])

    with torch.no_grad():
        parts = [embed(number) for number in range(len(chunks))]
    whole = [torch.cat(column).requires_grad_() for column in zip(*parts, strict=True)]
    value = loss(*whole)
    value.backward()
    gradients = list(zip(*(part.grad.split(micro_batch_size) for part in whole if part.grad is not None), strict=True))
    for number in range(len(chunks)):
        torch.autograd.backward(embed(number), gradients[number])
    return value.detach()
