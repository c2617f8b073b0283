"""Large batches in little memory: embed in chunks, take the loss over all, embed again for the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class GradCache:
    """GradCache (Gao et al. 2021): the gradient of one large batch, with the memory of a small one.

    The caller takes a loss of `features`, calls its `backward`, which leaves their gradients with them, and then this
    object's. Exact with dropout too: a chunk that is embedded twice is so from the same seed. Costs one more forward
    pass through all chunks but the last, whose activations are kept meanwhile.

    Args:
        encode: a chunk of each input -> tensors with one row an input row, and scalars that no input changes.
        inputs: tensors [n, ...], cut alike.
        micro_batch_size: rows a chunk.
        seed: of the chunks' dropout.

    Attributes:
        features: what `encode` gives of all inputs, as leaves of a new graph.
    """

    def __init__(
        self, encode: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], micro_batch_size: int, seed: int
    ) -> None:
        self._encode, self._seed, self._micro_batch_size = encode, seed, micro_batch_size
        self._chunks = list(zip(*(values.split(micro_batch_size) for values in inputs), strict=True))
        with torch.no_grad():
            parts = [self._embed(number) for number in range(len(self._chunks) - 1)]
        self._kept = self._embed(len(self._chunks) - 1)
        columns = zip(*parts, self._kept, strict=True)
        self.features = tuple(
            (torch.cat(column) if column[0].ndim else column[0].clone()).detach().requires_grad_() for column in columns
        )

    def backward(self, backward: Callable[[Tensor, bool], None]) -> None:
        """Carries the gradients of `features` on into what `encode` depends on.

        Args:
            backward: gets a scalar for each chunk, whose gradients add up to the loss's, and whether it is the last.
        """
        last = len(self._chunks) - 1
        backward(self._loss(last, self._kept), last == 0)
        for number in range(last):
            backward(self._loss(number, self._embed(number)), number == last - 1)

    def _loss(self, number: int, parts: tuple[Tensor, ...]) -> Tensor:
        """A scalar with a chunk's part of the gradient."""
        pieces = [
            (part * self._gradient(whole, number)).sum()
            for part, whole in zip(parts, self.features, strict=True)
            if part.requires_grad and whole.grad is not None
        ]
        return torch.stack(pieces).sum()

    def _embed(self, number: int) -> tuple[Tensor, ...]:
        torch.manual_seed(self._seed + number)
        return self._encode(*self._chunks[number])

    def _gradient(self, whole: Tensor, number: int) -> Tensor:
        """A chunk's rows of the loss's gradient; of a scalar, which every chunk gives, an equal share."""
        assert whole.grad is not None
        return whole.grad.split(self._micro_batch_size)[number] if whole.ndim else whole.grad / len(self._chunks)
