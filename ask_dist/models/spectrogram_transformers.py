"""Transformers over spectrograms, out of folders of the library transformers: AST, and Whisper's encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import melscale_fbanks

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, register_audio_encoder
from ask_dist.models.clap import load_extractor
from ask_dist.models.pretrained import description, load_network, source_path
from ask_dist.models.spectrum import MelSpectrum

EPSILON = torch.finfo(torch.float32).eps
KALDI_WINDOW, KALDI_HOP = 0.025, 0.010  # seconds


class AstEncoder(AudioEncoder):
    """The Audio Spectrogram Transformer (Gong et al. 2021); the mean of its two summary tokens is the clip's vector.

    Attributes:
        sample_rate: of the folder's feature extractor; 16,000 Hz for the authors' models.
        output_dim: hidden size of the network.

    Args:
        folder: of an `ASTModel` or one with a classifier, with preprocessor_config.json.

    Raises:
        InputError: transformers is not installed, or can't read the folder.
    """

    has_log_mel = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = load_network(folder, "ASTModel")
        self.extractor = load_extractor(folder, "ASTFeatureExtractor")
        self.sample_rate: int = self.extractor.sampling_rate
        self.output_dim: int = self.network.config.hidden_size
        length = int(KALDI_WINDOW * self.sample_rate)
        fft = 1 << (length - 1).bit_length()
        banks, _ = get_mel_banks(self.extractor.num_mel_bins, fft, self.sample_rate, 20.0, 0.0, 100.0, -500.0, 1.0)
        filters = nn.functional.pad(banks, (0, 1)).T.contiguous()  # the highest frequency counts for nothing
        window = torch.hann_window(length, periodic=False)
        hop = int(KALDI_HOP * self.sample_rate)
        self._mel = MelSpectrum(window, hop, fft, filters, centred=False, prepare=_emphasise)

    def assets(self) -> dict[str, bytes]:
        return description("audio", self.network.config, self.extractor)

    def forward(self, audio: Tensor) -> Tensor:
        """float32 [batch, samples] -> [batch, output_dim]."""
        features = self.front_end(audio).to(self.network.layernorm.weight.dtype)
        return self.network(input_values=features).pooler_output

    def front_end(self, audio: Tensor) -> Tensor:
        """Log-mel of Kaldi's kind, cut or filled up, and scaled: float32 [batch, samples] -> [batch, frames, bands]."""
        settings, window = self.extractor, len(self._mel.window)
        audio = nn.functional.pad(audio, (0, max(0, window - audio.shape[1])))
        bands = self.masked(self._mel(audio).clamp(min=EPSILON).log()[:, : settings.max_length])
        bands = nn.functional.pad(bands, (0, 0, 0, settings.max_length - bands.shape[1]))
        return (bands - settings.mean) / (2 * settings.std) if settings.do_normalize else bands


class WhisperEncoder(AudioEncoder):
    """Whisper's encoder (Radford et al. 2022); the mean of its states over the clip is the clip's vector.

    Attributes:
        sample_rate: 16,000 Hz.
        output_dim: width of the network.

    Args:
        folder: of a `WhisperModel` or one with a head, with preprocessor_config.json. Its decoder is left out.

    Raises:
        InputError: transformers is not installed, or can't read the folder.
    """

    has_log_mel = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = load_network(folder, "WhisperModel").encoder
        self.extractor = load_extractor(folder, "WhisperFeatureExtractor")
        self.sample_rate: int = self.extractor.sampling_rate
        self.output_dim: int = self.network.config.d_model
        size, rate = self.extractor.n_fft, self.sample_rate
        filters = melscale_fbanks(size // 2 + 1, 0.0, 8000.0, self.extractor.feature_size, rate, "slaney", "slaney")
        self._mel = MelSpectrum(torch.hann_window(size), self.extractor.hop_length, size, filters)

    def assets(self) -> dict[str, bytes]:
        return description("audio", self.network.config, self.extractor)

    def forward(self, audio: Tensor) -> Tensor:
        """float32 [batch, samples] -> [batch, output_dim]."""
        features = self.front_end(audio).to(self.network.layer_norm.weight.dtype)
        states = self.network(input_features=features).last_hidden_state
        # A state each two frames. Those of the silence that fills up say nothing of the clip.
        sounding = -(-audio.shape[1] // (2 * self.extractor.hop_length))
        return states[:, :sounding].mean(dim=1)

    def front_end(self, audio: Tensor) -> Tensor:
        """Log-mel above 80 dB below the loudest: float32 [batch, samples] -> [batch, bands, frames]."""
        length = self.extractor.n_samples
        if audio.shape[1] > length:
            seconds, longest = audio.shape[1] / self.sample_rate, length / self.sample_rate
            raise InputError(f"data.clip_seconds={seconds:g} is more than Whisper takes; set it to {longest:g}")
        frames = -(-audio.shape[1] // self.extractor.hop_length)
        bands = self._mel(nn.functional.pad(audio, (0, length - audio.shape[1])))[:, :-1]
        bels = bands.clamp(min=1e-10).log10().transpose(1, 2)
        scaled = (torch.maximum(bels, bels.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
        sounding = self.masked(scaled[..., :frames].transpose(1, 2)).transpose(1, 2)
        return torch.cat([sounding, scaled[..., frames:]], dim=2)


def _emphasise(frames: Tensor) -> Tensor:
    """Without their mean, and each sample less 0.97 of the one before, as Kaldi prepares frames."""
    frames = frames - frames.mean(dim=-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    return frames - 0.97 * before


@register_audio_encoder("ast", reads=("source",))
def _ast(config: Model, sample_rate: int) -> AudioEncoder:
    return AstEncoder(source_path(config.audio.source, "model.audio"))


@register_audio_encoder("whisper", reads=("source",))
def _whisper(config: Model, sample_rate: int) -> AudioEncoder:
    return WhisperEncoder(source_path(config.audio.source, "model.audio"))
