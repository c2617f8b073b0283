"""Two encoders, projected onto one sphere."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, build_audio_encoder
from ask_dist.models.text import TextEncoder, Vocabulary, build_text_encoder

LOGIT_SCALE = 14.3  # a temperature of 0.07 (Radford et al. 2021, section 2.5)


class Features(NamedTuple):
    """What a forward pass gives.

    audio_features, text_features: float32 [batch, embedding_dim], rows of unit length; None for a side not asked for.
    logit_scale: float32 scalar, already exponentiated and capped.
    logit_bias: float32 scalar; 0 where the model has none.
    """

    audio_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


class DualEncoder(nn.Module):
    """An audio and a text encoder, with a two-layer projection each if the configuration wants one, the learned
    logit_scale, and for the sigmoid loss a learned logit_bias.

    Attributes:
        given: towers ("audio", "text") whose vectors `forward` takes in place of their inputs, for frozen ones.

    Raises:
        InputError: there is no projection, and an encoder is not as wide as the shared space.
    """

    def __init__(self, audio: AudioEncoder, text: TextEncoder, config: Model) -> None:
        super().__init__()
        self.audio = audio
        self.text = text
        self.audio_projection = _projection(audio.output_dim, config)
        self.text_projection = _projection(text.output_dim, config)
        # One element, not a scalar: DeepSpeed broadcasts parameters as views of bytes.
        first = min(_first_scale(audio, text, config), config.logit_scale_max)
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(first)]))
        self.logit_scale_max = config.logit_scale_max
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))
        self.given: frozenset[str] = frozenset()

    @property
    def logit_scale(self) -> Tensor:
        """float32 scalar, exponentiated and capped; above the cap with the gradient of one that is not, or it would
        never come back."""
        scale = self.log_logit_scale[0].exp()
        return scale.clamp(max=self.logit_scale_max).detach() + (scale - scale.detach())

    def largest(self) -> dict[nn.Parameter, float]:
        """What parameters must not exceed: to be clamped to it after each update."""
        return {self.log_logit_scale: math.log(self.logit_scale_max)}

    def encode_audio(self, audio: Tensor, lengths: Tensor | None = None) -> Tensor:
        """float32 [batch, samples] -> unit rows float32 [batch, embedding_dim]; `lengths` as in `by_length`."""
        return self._project(self.audio_projection, self.audio.by_length(audio, lengths))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [batch, tokens] -> unit rows float32 [batch, embedding_dim]."""
        return self._project(self.text_projection, self.text(tokens))

    def forward(self, audio: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Features:
        """Both towers' rows; of a tower in `given`, from its own vectors, float [batch, output_dim].

        Args:
            lengths: int64 [batch] on the CPU, the samples of each clip, or None where all are as long.
        """
        heard = audio if "audio" in self.given else self.audio.by_length(audio, lengths)
        read = tokens if "text" in self.given else self.text(tokens)
        audio_features = self._project(self.audio_projection, heard)
        text_features = self._project(self.text_projection, read)
        bias = torch.zeros_like(self.logit_scale) if self.logit_bias is None else self.logit_bias[0]
        return Features(audio_features, text_features, self.logit_scale, bias.float())

    def _project(self, projection: nn.Module, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(projection(vectors.to(self.log_logit_scale.dtype)).float(), dim=-1)


def build_dual_encoder(config: Model, sample_rate: int, vocabulary: Vocabulary) -> DualEncoder:
    """The pair of encoders that the configuration names."""
    return DualEncoder(build_audio_encoder(config, sample_rate), build_text_encoder(config, vocabulary), config)


def _first_scale(audio: AudioEncoder, text: TextEncoder, config: Model) -> float:
    """As configured, else that of the one model that both towers are of."""
    if config.logit_scale_init is not None:
        return config.logit_scale_init
    whole = config.projection == "none" and audio.logit_scale == text.logit_scale
    return audio.logit_scale if whole and audio.logit_scale is not None else LOGIT_SCALE


def _projection(inputs: int, config: Model) -> nn.Module:
    outputs = config.embedding_dim
    if config.projection == "none":
        if inputs != outputs:
            raise InputError(
                f"model.projection=none with an encoder of width {inputs} and model.embedding_dim={outputs}: set "
                f"model.embedding_dim={inputs} if both encoders are as wide, else model.projection=mlp"
            )
        return nn.Identity()
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(outputs, outputs))
