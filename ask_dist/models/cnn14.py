"""CNN14 of PANNs (Kong et al. 2020, "PANNs: Large-Scale Pretrained Audio Neural Networks", table 1), from a checkpoint
of its authors. The network is written here; of the checkpoint nothing but arrays is read.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, register_audio_encoder
from ask_dist.models.pretrained import SAVED, FixedStatistics, first_line, is_saved, source_path
from ask_dist.models.spectrum import MelSpectrum

RATE, WINDOW, HOP, MEL_BINS = 32_000, 1024, 320, 64
LOWEST, HIGHEST = 50.0, 14_000.0
CHANNELS = (64, 128, 256, 512, 1024, 2048)
DIM, CLASSES = 2048, 527
# Five times two frames become one.
SHORTEST = (2**5 - 1) * HOP
# What the authors keep beside the network's weights: constants of the front end.
FRONT_END = ("spectrogram_extractor.", "logmel_extractor.")


class _Block(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU. The names are those of the published checkpoint."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        return nn.functional.relu(self.bn2(self.conv2(x)))


class Cnn14Encoder(FixedStatistics, AudioEncoder):
    """CNN14 without its classifier.

    Attributes:
        sample_rate: 32,000 Hz, no other.
        output_dim: 2,048.
    """

    sample_rate = RATE
    output_dim = DIM
    has_log_mel = True

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(MEL_BINS)
        for number, (inputs, outputs) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False), 1):
            self.add_module(f"conv_block{number}", _Block(inputs, outputs))
        self.fc1 = nn.Linear(DIM, DIM)
        filters = melscale_fbanks(WINDOW // 2 + 1, LOWEST, HIGHEST, MEL_BINS, RATE, "slaney", "slaney")
        self._mel = MelSpectrum(torch.hann_window(WINDOW), HOP, WINDOW, filters)

    def assets(self) -> dict[str, bytes]:
        return {f"audio/{SAVED}": b"{}"}

    def tower_blocks(self) -> list[nn.Module]:
        return [self.get_submodule(f"conv_block{number}") for number in range(1, len(CHANNELS) + 1)]

    def load(self, path: Path) -> None:
        """Takes the weights of a checkpoint: a mapping with `model`, or the weights themselves.

        Raises:
            InputError: the file holds anything but arrays and plain values, or another network.
        """
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            weights = stored.get("model", stored)
            kept = {name: weights[name] for name in weights if not name.startswith((*FRONT_END, "fc_audioset."))}
            self.load_state_dict(kept)
        except (
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            pickle.UnpicklingError,
        ) as error:
            raise InputError(
                f"{path} is no checkpoint of CNN14: {first_line(error)}; give Cnn14_mAP=0.431.pth"
            ) from None

    def forward(self, audio: Tensor) -> Tensor:
        """float32 [batch, samples] -> [batch, 2048]."""
        x = self.front_end(audio).to(self.fc1.weight.dtype)
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        for number, block in enumerate(self.tower_blocks(), 1):
            x = block(x)
            if number < len(CHANNELS):
                x = nn.functional.avg_pool2d(x, 2)
            x = nn.functional.dropout(x, 0.2, self.training)
        x = x.mean(dim=3)
        x = nn.functional.dropout(x.amax(dim=2) + x.mean(dim=2), 0.5, self.training)
        return nn.functional.dropout(nn.functional.relu(self.fc1(x)), 0.5, self.training)

    def front_end(self, audio: Tensor) -> Tensor:
        """Decibels of the mel bands: float32 [batch, samples] -> [batch, 1, frames, 64]; silence fills up to 0.31 s."""
        audio = nn.functional.pad(audio, (0, max(0, SHORTEST - audio.shape[1])))
        return self.masked(10.0 * self._mel(audio).clamp(min=1e-10).log10()).unsqueeze(1)


@register_audio_encoder("cnn14", reads=("source",))
def _cnn14(config: Model, sample_rate: int) -> AudioEncoder:
    path = source_path(config.audio.source, "model.audio")
    encoder = Cnn14Encoder()
    if not is_saved(path):
        encoder.load(path)
    return encoder
