"""CLAP (Wu et al. 2023) as transformers has it: HTS-AT hears, RoBERTa reads, each with its projection.

A folder of a whole `ClapModel` can be the start of both towers; with `model.projection: none` their vectors are the
model's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, register_audio_encoder
from ask_dist.models.minilm import FolderTextEncoder
from ask_dist.models.pretrained import FixedStatistics, description, load_network, optional_module, source_path
from ask_dist.models.spectrum import MelSpectrum
from ask_dist.models.text import TextEncoder, Vocabulary, register_text_encoder


class ClapAudioEncoder(FixedStatistics, AudioEncoder):
    """HTS-AT with its projection.

    Attributes:
        sample_rate: of the folder's feature extractor; 48,000 Hz for LAION's models.
        output_dim: `projection_dim` of the folder; 512 for LAION's models.
        extractor: transformers' own feature extractor, of which the settings are used.

    Args:
        folder: of a `ClapModel` or a `ClapAudioModelWithProjection`, with preprocessor_config.json.

    Raises:
        InputError: transformers is not installed, or can't read the folder.
    """

    before_blocks = ("batch_norm",)
    has_log_mel = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = load_network(folder, "ClapAudioModelWithProjection")
        self.extractor = load_extractor(folder, "ClapFeatureExtractor")
        self.fused: bool = self.network.config.enable_fusion
        if self.fused:  # what hears sounds that are longer than the extractor takes: no clip is
            patches = self.network.audio_model.audio_encoder.patch_embed
            patches.fusion_model.requires_grad_(False)
            patches.mel_conv2d.requires_grad_(False)
        self.sample_rate: int = self.extractor.sampling_rate
        self.output_dim: int = self.network.config.projection_dim
        self.logit_scale = _logit_scale(folder)
        self._mel = _mel_spectrum(self.extractor)

    def assets(self) -> dict[str, bytes]:
        return description("audio", self.network.config, self.extractor)

    def forward(self, audio: Tensor) -> Tensor:
        """float32 [batch, samples] -> [batch, output_dim]."""
        features = self.front_end(audio).to(self.network.audio_projection.linear1.weight.dtype)
        longer = torch.zeros(len(audio), 1, dtype=torch.bool, device=audio.device) if self.fused else None
        return self.network(input_features=features, is_longer=longer).audio_embeds

    def front_end(self, audio: Tensor) -> Tensor:
        """Decibels of the mel bands: float32 [batch, samples] -> [batch, 1, frames, bands], or 4 alike where fused.

        As `ClapFeatureExtractor` has it for sounds of its length or shorter ones.
        """
        bels = self._mel(_fit(audio, self.extractor)).clamp(min=1e-10).log10()
        return self.masked(10.0 * bels).unsqueeze(1).expand(-1, 4 if self.fused else 1, -1, -1)


class ClapTextEncoder(FolderTextEncoder):
    """RoBERTa with its pooling and projection.

    Args:
        folder: of a `ClapModel` or a `ClapTextModelWithProjection`, with a fast tokenizer.
        max_tokens: captions are cut there.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        super().__init__(folder, max_tokens, kind="ClapTextModelWithProjection")
        self.output_dim = self.network.config.projection_dim
        self.logit_scale = _logit_scale(folder)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [batch, tokens] of `tokenize` -> [batch, output_dim]."""
        mask = (tokens != 0).long()
        return self.network(input_ids=self.exchange_padding(tokens), attention_mask=mask).text_embeds


def load_extractor(folder: Path, kind: str) -> Any:
    """A feature extractor of transformers: its settings are read, its code is the library's own.

    Raises:
        InputError: the folder holds no preprocessor_config.json of this kind.
    """
    extractor = getattr(optional_module("transformers", str(folder)), kind)
    if not (folder / "preprocessor_config.json").is_file():
        raise InputError(f"{folder} holds no preprocessor_config.json, which says how its network hears; add it")
    try:
        return extractor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises types of many libraries
        raise InputError(f"{folder}/preprocessor_config.json can't be used: {str(error).splitlines()[0]}") from None


def _logit_scale(folder: Path) -> float | None:
    """That of a whole `ClapModel` in one file; None where only a tower lies there, or parts."""
    path = folder / "model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return float(file.get_tensor("logit_scale_a").exp()) if "logit_scale_a" in file.keys() else None  # noqa: SIM118


def _mel_spectrum(extractor: Any) -> MelSpectrum:
    """Two banks of filters, as LAION trained: of Slaney for sounds that were cut, of HTK for fusion."""
    fused = extractor.truncation == "fusion"
    filters = melscale_fbanks(
        extractor.fft_window_size // 2 + 1,
        extractor.frequency_min,
        extractor.frequency_max,
        extractor.feature_size,
        extractor.sampling_rate,
        norm=None if fused else "slaney",
        mel_scale="htk" if fused else "slaney",
    )
    size = extractor.fft_window_size
    return MelSpectrum(torch.hann_window(size), extractor.hop_length, size, filters)


def _fit(audio: Tensor, extractor: Any) -> Tensor:
    """Sounds of the extractor's length: shorter ones are repeated and filled up with silence, as it says."""
    length = extractor.nb_max_samples
    samples = audio.shape[1]
    if samples > length:
        seconds, longest = samples / extractor.sampling_rate, length / extractor.sampling_rate
        raise InputError(f"data.clip_seconds={seconds:g} is more than the audio encoder takes; set it to {longest:g}")
    if extractor.padding == "repeat":
        return audio.repeat(1, length // samples + 1)[:, :length]
    if extractor.padding == "repeatpad":
        audio = audio.repeat(1, length // samples)
    return nn.functional.pad(audio, (0, length - audio.shape[1]))


@register_audio_encoder("clap-htsat", reads=("source",))
def _htsat(config: Model, sample_rate: int) -> AudioEncoder:
    return ClapAudioEncoder(source_path(config.audio.source, "model.audio"))


@register_text_encoder("clap-text", reads=("source",))
def _text(config: Model, vocabulary: Vocabulary) -> TextEncoder:
    return ClapTextEncoder(source_path(config.text.source, "model.text"), config.text.max_tokens)
