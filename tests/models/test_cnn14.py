"""CNN14: the authors' names and front end, and a checkpoint that can do nothing but give arrays."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ask_dist.config import AudioModel, Model
from ask_dist.errors import InputError
from ask_dist.models.audio import build_audio_encoder
from ask_dist.models.cnn14 import RATE, Cnn14Encoder
from tests.models.test_saved import Malice
from tests.models.towers import save_cnn14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_cnn14(tmp_path_factory.mktemp("panns") / "Cnn14_mAP=0.431.pth")


def noise(seconds: float) -> Tensor:
    return 0.3 * torch.randn(2, round(seconds * RATE), generator=torch.Generator().manual_seed(0))


def build(path: Path) -> Cnn14Encoder:
    encoder = build_audio_encoder(Model(audio=AudioModel(name="cnn14", source=str(path))), RATE)
    assert isinstance(encoder, Cnn14Encoder)
    return encoder.eval()


def test_the_layers_have_the_names_and_shapes_of_the_published_checkpoint(checkpoint):
    shapes = {name: tuple(weight.shape) for name, weight in build(checkpoint).state_dict().items()}
    assert shapes["bn0.running_mean"] == (64,)
    assert shapes["conv_block1.conv1.weight"] == (64, 1, 3, 3)
    assert shapes["conv_block6.conv2.weight"] == (2048, 2048, 3, 3)
    assert shapes["conv_block4.bn2.num_batches_tracked"] == ()
    assert shapes["fc1.weight"] == (2048, 2048)
    parameters = sum(parameter.numel() for parameter in build(checkpoint).parameters())
    assert parameters == 80_753_615 - 527 * 2049  # table 1 of the paper, less the classifier


def test_a_frame_of_the_front_end_follows_the_formulas():
    audio = noise(1.0)
    frames = Cnn14Encoder().front_end(audio)
    assert frames.shape == (2, 1, 101, 64)
    start = 50 * 320 - 512  # the fiftieth has its middle at 0.5 s
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    power = np.abs(np.fft.rfft(audio[0, start : start + 1024].numpy() * window)) ** 2

    def hertz(mel: float) -> float:  # of Slaney: linear below 1 kHz
        return mel * 200 / 3 if mel < 15 else 1000 * np.exp(np.log(6.4) / 27 * (mel - 15))

    highest = 15 + np.log(14.0) / (np.log(6.4) / 27)
    edges = [hertz(mel) for mel in np.linspace(50 * 3 / 200, highest, 66)]
    for row in (0, 20, 63):
        low, middle, high = edges[row : row + 3]
        bins = np.arange(513) * RATE / 1024
        rises = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
        wanted = 10 * np.log10(power @ np.maximum(0, rises) * 2 / (high - low))
        assert float(frames[0, 0, 50, row]) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_any_length_gives_a_vector(checkpoint, seconds):
    encoder = build(checkpoint)
    with torch.no_grad():
        vectors = encoder(noise(seconds))
    assert vectors.shape == (2, encoder.output_dim) == (2, 2048)
    assert torch.isfinite(vectors).all()


def test_what_is_no_checkpoint_of_it_is_refused_and_never_runs(tmp_path):
    marker = tmp_path / "the-pickle-ran"
    files = {
        "bomb.pth": pickle.dumps(Malice(marker)),
        "text.pth": b"not a checkpoint",
        "empty.pth": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"model": Malice(marker)}, tmp_path / "zip.pth")
    torch.save({"model": {"fc1.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in (*files, "zip.pth", "other.pth", "list.pth"):
        with pytest.raises(InputError, match=f"{name} is no checkpoint of CNN14") as error:
            build(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not marker.exists()
