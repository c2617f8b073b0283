"""Seeded rows for the bank's tests."""

from __future__ import annotations

import numpy as np
import pytest

from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit, State
from ask_dist.bank.prototypes import unit_rows


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def state(rng: np.random.Generator) -> State:
    """Of a bank of 40 rows with prototypes."""
    bank = KnowledgeBank(dim=8, capacity=100)
    bank.upsert(np.arange(40), unit_rows(rng.normal(size=(40, 8))), unit_rows(rng.normal(size=(40, 8))), None, step=3)
    halves = [(bank.snapshot().audio[:4], bank.snapshot().text[:4])]
    bank.commit(Commit.of_prototypes(halves, bank.snapshot()))
    return bank.state()
