"""Embeddings that drift as training makes them drift: a rotation that depends smoothly on the row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ask_dist.bank.prototypes import unit_rows

DIM = 24


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture
def rows(rng) -> Callable[[int], np.ndarray]:
    """Unit rows around 30 centres, as embeddings of clips lie."""
    centres = rng.normal(size=(30, DIM))

    def make(count: int) -> np.ndarray:
        return unit_rows(centres[rng.integers(0, 30, count)] + 0.6 * rng.normal(size=(count, DIM)))

    return make


@pytest.fixture
def drift(rng) -> Callable[..., np.ndarray]:
    """Moves rows by `amount`: a common rotation, and a part that a linear map cannot follow."""
    common = rng.normal(size=(DIM, DIM)) / DIM
    into, out = rng.normal(size=(DIM, 8)), rng.normal(size=(8, DIM)) / 8

    def move(values: np.ndarray, amount: float = 1.0) -> np.ndarray:
        return unit_rows(values + amount * (values @ (common - common.T) + np.tanh(1.5 * values @ into) ** 2 @ out))

    return move
