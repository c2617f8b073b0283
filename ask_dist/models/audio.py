"""Audio encoders: waveform in, one vector a clip out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ask_dist.config import Augment, Model
from ask_dist.errors import InputError
from ask_dist.models.encoder import Encoder, Registry
from ask_dist.models.spectrum import power_spectrum

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchaudio announces its maintenance phase at every import
    from torchaudio.functional import mask_along_axis_iid
    from torchaudio.transforms import MelSpectrogram


@dataclass(frozen=True)
class SpecAugment:
    """One mask over the frames and one over the bands of each clip, set to the batch's mean (Park et al. 2019).

    Their lengths are uniform up to a share of the axis, their places uniform; drawn from torch's default generator.

    Attributes:
        time, frequency: the longest masks, as shares from 0 to 1; 0 draws nothing.
    """

    time: float
    frequency: float

    def __call__(self, log_mel: Tensor) -> Tensor:
        """float [batch, ..., frames, bands] -> the same."""
        mean, axes = log_mel.detach().mean(), log_mel.ndim
        for axis, share in ((axes - 2, self.time), (axes - 1, self.frequency)):
            log_mel = mask_along_axis_iid(log_mel, log_mel.shape[axis], mean, axis, p=share)
        return log_mel


class AudioEncoder(Encoder):
    """What the trainer asks of an audio encoder.

    Attributes:
        sample_rate: Hz of the waveforms that `forward` takes.
        output_dim: width of the vectors that it gives.

    `forward(audio)` takes float32 [batch, samples] in [-1, 1] on any device and gives float [batch, output_dim].
    The front end (log-mel or another) is part of `forward`, so it runs where the training runs. One that makes a
    log-mel passes it through `masked` and says so by `has_log_mel`.
    """

    sample_rate: int
    has_log_mel: bool = False
    spec_augment: SpecAugment | None = None

    def by_length(self, audio: Tensor, lengths: Tensor | None) -> Tensor:
        """The vectors of clips of their own lengths: the tower runs once for each length, on clips cut to it.

        So nothing is computed for padding, and a clip's vector does not depend on those beside it.

        Args:
            audio: float32 [batch, samples].
            lengths: int64 [batch] on the CPU, at most `samples` each; None where all clips are as long.
        """
        if lengths is None:
            return self(audio)
        groups = [(length, (lengths == length).nonzero().squeeze(1)) for length in lengths.unique().tolist()]
        vectors = torch.cat([self(audio[places.to(audio.device), :length]) for length, places in groups])
        places = torch.cat([places for _, places in groups])
        return vectors[places.argsort().to(audio.device)]

    def masked(self, log_mel: Tensor) -> Tensor:
        """A log-mel [batch, ..., frames, bands] with the masks of `augment`, drawn for each clip in training alone."""
        return self.spec_augment(log_mel) if self.training and self.spec_augment is not None else log_mel

    def augment(self, settings: Augment) -> None:
        """From now on log-mels are masked in training, if the settings ask for it.

        Raises:
            InputError: the encoder has no log-mel.
        """
        longest = max(settings.time_mask, settings.frequency_mask)
        if longest and not self.has_log_mel:
            raise InputError(
                f"augment.time_mask and frequency_mask ({longest:g}) mask a log-mel, which {type(self).__name__} does "
                "not have; set both to 0"
            )
        self.spec_augment = SpecAugment(settings.time_mask, settings.frequency_mask) if longest else None


_REGISTRY: Registry[Callable[[Model, int], AudioEncoder]] = Registry("model.audio.name")
# Makes `factory(model_config, sample_rate) -> AudioEncoder` available as `model.audio.name`.
register_audio_encoder = _REGISTRY.register
# audio_settings_read(name): which of encoder.CHOICES the encoder reads.
audio_settings_read = _REGISTRY.reads


def build_audio_encoder(config: Model, sample_rate: int) -> AudioEncoder:
    """The encoder that the configuration names, frozen if it says so.

    Raises:
        InputError: nobody registered it, it takes sound of another rate, or its own files can't be used.
    """
    encoder = _REGISTRY.find(config.audio.name)(config, sample_rate)
    if encoder.sample_rate != sample_rate:
        raise InputError(
            f"data.sample_rate={sample_rate} does not fit model.audio.name={config.audio.name}; "
            f"set it to {encoder.sample_rate}"
        )
    return encoder.freeze(config.audio.unfreeze_at) if config.audio.freeze else encoder


class LogMel(nn.Module):
    """Log-mel spectrogram (torchaudio): float32 [batch, samples] -> [batch, 1, mel_bins, frames], one each 20 ms."""

    def __init__(self, sample_rate: int, mel_bins: int) -> None:
        super().__init__()
        hop = sample_rate // 50
        self.mel = MelSpectrogram(
            sample_rate, n_fft=2 * hop, hop_length=hop, n_mels=mel_bins, f_min=40.0, norm="slaney", mel_scale="slaney"
        )

    def forward(self, audio: Tensor) -> Tensor:
        # The transform stays in fp32: the squares of quiet samples vanish in bf16.
        with torch.autocast(audio.device.type, enabled=False):
            mel = self.mel.mel_scale(self._spectrum(audio.float()))
        # 10 and 4 bring the log of scenes with pauses to about zero mean and unit variance.
        return ((mel + 1e-6).log().unsqueeze(1) + 10.0) / 4.0

    def _spectrum(self, audio: Tensor) -> Tensor:
        transform = self.mel.spectrogram
        if not torch.onnx.is_in_onnx_export():
            return transform(audio)
        half = transform.n_fft // 2
        padded = nn.functional.pad(audio.unsqueeze(1), (half, half), mode="reflect").squeeze(1)
        return power_spectrum(padded, transform.window, transform.hop_length, transform.n_fft)


class _Block(nn.Module):
    """3x3 convolution, group norm, ReLU. Group norm: equal on any number of workers, unlike batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(self.convolution(x)))


class ConvAudioEncoder(AudioEncoder):
    """Small convolutional encoder, from scratch: log-mel, four strided convolutions, a bidirectional GRU over time.

    The GRU tells "a then b" from "b then a" and counts; an attention layer in its place learned far slower.
    """

    has_log_mel = True

    def __init__(self, sample_rate: int, mel_bins: int, width: int, dropout: float) -> None:
        super().__init__()
        if width % 8:
            raise InputError(
                f"model.audio.width={width} is no multiple of 8, the groups of its norms; use {8 + width // 8 * 8}"
            )
        self.sample_rate = sample_rate
        self.output_dim = 8 * width
        self.front_end = LogMel(sample_rate, mel_bins)
        self.blocks = nn.Sequential(
            _Block(1, width, (2, 2)),
            _Block(width, 2 * width, (2, 2)),
            _Block(2 * width, 4 * width, (2, 2)),
            _Block(4 * width, 4 * width, (2, 1)),
        )
        self.frame = nn.Linear(4 * width * ((mel_bins + 15) // 16), self.output_dim)
        self.dropout = nn.Dropout(dropout)
        self.context = nn.GRU(self.output_dim, self.output_dim // 2, batch_first=True, bidirectional=True)

    def forward(self, audio: Tensor) -> Tensor:
        log_mel = self.masked(self.front_end(audio).transpose(2, 3)).transpose(2, 3)
        maps = self.blocks(log_mel)
        frames = nn.functional.relu(self.frame(maps.flatten(1, 2).transpose(1, 2)))
        states, _ = self.context(self.dropout(frames))
        return states.amax(dim=1) + states.mean(dim=1)


@register_audio_encoder("conv", reads=())
def _conv(config: Model, sample_rate: int) -> AudioEncoder:
    return ConvAudioEncoder(sample_rate, config.audio.mel_bins, config.audio.width, config.dropout)
