"""A small model over a vocabulary of its own."""

from __future__ import annotations

import pytest
import torch

from ask_dist.config import AudioModel, Model, TextModel
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.text import Vocabulary

CAPTIONS = ["a viola, then a drum", "a drum, then a viola", "three loud notes", "Rain on a tin roof"]


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.train(CAPTIONS, size=300)


@pytest.fixture
def settings() -> Model:
    audio, text = AudioModel(width=8, mel_bins=20), TextModel(width=16, layers=1, heads=2, max_tokens=8)
    return Model(embedding_dim=12, audio=audio, text=text)


@pytest.fixture
def model(settings, vocabulary) -> DualEncoder:
    torch.manual_seed(0)
    return build_dual_encoder(settings, 8000, vocabulary).eval()
