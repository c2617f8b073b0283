"""Mixtures of a batch's clips: what is heard and read, under which ids, and that a seed draws them again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ask_dist.data.loader import Batch
from ask_dist.models.text import Vocabulary
from ask_dist.train.mixing import SPREAD, mix

SIZE, CPU = 20, torch.device("cpu")
VOCABULARY = Vocabulary.train(["Tone and Tone"], 280)


def tokenize(captions: list[str]) -> Tensor:
    return VOCABULARY.encode(captions, 32)


def forbidden(captions: list[str]) -> Tensor:
    raise AssertionError("captions were tokenized anew")


def make_batch(invalid: int = 0) -> Batch:
    """Tones, each at a frequency of its own, so that a spectrum tells which are in a mixture."""
    time = torch.arange(4000) / 4000
    loudness = torch.linspace(0.05, 0.9, SIZE).unsqueeze(1)
    valid = torch.ones(SIZE, dtype=torch.bool)
    valid[SIZE - invalid :] = False
    return Batch(
        ids=torch.arange(100, 100 + SIZE).where(valid, torch.tensor(-1)),
        keys=[f"clip-{number}" for number in range(SIZE)],
        audio=loudness * (2 * math.pi * 50 * torch.arange(1, SIZE + 1).unsqueeze(1) * time).sin(),
        captions=[f"Tone {number}." for number in range(SIZE)],
        tokens=tokenize([f"Tone {number}." for number in range(SIZE)]),
        valid=valid,
        swapped=torch.zeros(SIZE, dtype=torch.bool),
        epoch=0,
        step=0,
    )


def levels(audio: torch.Tensor) -> torch.Tensor:
    """Amplitude of each clip's tone in each row: float [rows, clips]."""
    return (torch.fft.rfft(audio).abs() / 2000)[:, 50 : 50 * SIZE + 1 : 50]


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_clips_become_two_mixtures_under_one_new_id(seed):
    torch.manual_seed(seed)
    batch = make_batch()
    got, mixed = mix(batch, 0.5, CPU, tokenize)
    assert mixed.sum() == 10
    rows = mixed.nonzero().squeeze(1)
    heard = levels(got.audio) > 0.01
    for row in rows.tolist():
        row_and_other = heard[row].nonzero().squeeze(1).tolist()
        assert len(row_and_other) == 2
        (other,) = set(row_and_other) - {row}
        assert mixed[other]  # neither clip is left alone in the batch
        assert got.captions[row] == f"Tone {row} and Tone {other}."
        assert got.ids[row] == got.ids[other]
        own, added = levels(got.audio)[row, row], levels(got.audio)[row, other]
        assert abs(20 * math.log10(own / added)) <= SPREAD + 0.1
    assert got.ids[rows].unique().numel() == 5
    assert not set(got.ids[rows].tolist()) & set(batch.ids.tolist())
    assert got.audio.abs().max() <= 1.0
    for name in ("ids", "audio", "valid"):
        assert torch.equal(getattr(got, name)[~mixed], getattr(batch, name)[~mixed])
    assert [got.captions[row] for row in (~mixed).nonzero()] == [batch.captions[row] for row in (~mixed).nonzero()]
    assert torch.equal(got.tokens, tokenize(got.captions))
    assert torch.equal(batch.audio, make_batch().audio)  # the loader's batch is left as it was


def test_a_mixture_is_as_long_as_the_longer_of_its_clips():
    torch.manual_seed(0)
    batch = replace(make_batch(), lengths=100 * torch.arange(1, SIZE + 1))
    got, mixed = mix(batch, 0.5, CPU, tokenize)
    for row in mixed.nonzero().squeeze(1).tolist():
        both = (got.ids == got.ids[row]).nonzero().squeeze(1)
        assert got.lengths[row] == batch.lengths[both].max()
    assert torch.equal(got.lengths[~mixed], batch.lengths[~mixed])
    assert torch.equal(batch.lengths, 100 * torch.arange(1, SIZE + 1))


def test_a_seed_draws_the_same_mixtures_and_none_draws_nothing():
    torch.manual_seed(3)
    one, mixed = mix(make_batch(), 0.4, CPU, tokenize)
    torch.manual_seed(3)
    other, again = mix(make_batch(), 0.4, CPU, tokenize)
    assert torch.equal(mixed, again)
    assert torch.equal(one.audio, other.audio)
    assert one.captions == other.captions
    state = torch.get_rng_state()
    batch = make_batch()
    plain, none = mix(batch, 0.0, CPU, forbidden)
    assert plain is batch
    assert not none.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_slots_are_not_mixed():
    for seed in range(10):
        torch.manual_seed(seed)
        got, mixed = mix(make_batch(invalid=15), 1.0, CPU, tokenize)
        assert mixed.sum() == 4  # of five valid rows
        assert not mixed[~got.valid].any()
        assert (got.ids[~got.valid] == -1).all()
