"""A plain loop's client over a bank in the same process."""

from __future__ import annotations

import doctest

import numpy as np

from ask_dist.bank import local
from ask_dist.bank.local import LocalBankClient
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.prototypes import unit_rows


def test_an_answer_is_handed_over_once(rng):
    bank = KnowledgeBank(dim=8, capacity=50)
    client = LocalBankClient(bank, neighbours=3)
    assert client.collect() is None
    rows = unit_rows(rng.normal(size=(50, 8)))
    client.upsert(np.arange(50), rows, rows, None, step=1)
    client.prefetch(np.arange(5))
    knowledge = client.collect()
    assert knowledge is not None
    np.testing.assert_array_equal(knowledge.ids, bank.search_ids(np.arange(5), 3).ids)
    assert client.collect() is None


def test_prototypes_begin_a_generation(rng):
    client = LocalBankClient(KnowledgeBank(dim=8, capacity=50), neighbours=3)
    rows = unit_rows(rng.normal(size=(50, 8)))
    client.upsert(np.arange(50), rows, rows, None, step=1)
    assert client.prototypes is None
    client.rebuild_prototypes([2, 5])
    assert client.prototypes is not None
    assert client.prototypes.generation == 1
    assert [len(audio) for audio, _ in client.prototypes.levels] == [2, 5]


def test_the_documented_example_runs():
    assert doctest.testmod(local).failed == 0
