"""What the trained part of the encoders takes in, computed once for a split: log-mels, or frozen encoders' features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ask_dist.ablation.space import Corpus
from ask_dist.data.audio import BadSample, fit_length
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.shards import ShardList
from ask_dist.models.audio import AudioEncoder, LogMel
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.frozen import frozen_features
from ask_dist.models.minilm import FolderTextEncoder, minilm_folder
from ask_dist.models.text import TextEncoder, Vocabulary
from ask_dist.models.yamnet import YamnetEncoder

SAMPLE_RATE = 16000
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Inputs:
    """A split, one caption a clip.

    Attributes:
        audio: float16 [clips, frames or patches, width].
        text: float32 [clips, width] of a frozen text encoder, [clips, 0] where captions are to be tokenized.
        captions: the words.
        classes: of each clip.
        descriptions: the JSON of each clip.
    """

    audio: Tensor
    text: Tensor
    captions: list[str]
    classes: list[list[str]]
    descriptions: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, first: int, last: int) -> Inputs:
        """The clips first..last."""
        cut = slice(first, last)
        return Inputs(self.audio[cut], self.text[cut], self.captions[cut], self.classes[cut], self.descriptions[cut])


def load_inputs(corpus: Corpus, split: str, cache: Path) -> Inputs:
    """A split's inputs, out of `cache` if they were computed before.

    Raises:
        InputError: no such shards, or a package of the extra `pretrained` is missing.
    """
    frozen = corpus.encoders == "frozen"
    features = frozen_features(
        ShardList.load(corpus.shards / split),
        _read,
        YamnetEncoder() if frozen else LogMelFrames(corpus.model.audio.mel_bins),
        _minilm(corpus) if frozen else None,
        clip_seconds=corpus.clip_seconds,
        cache=cache,
    )
    first = torch.searchsorted(features.owner, torch.arange(len(features.keys)))
    captions = [several[0] for several in features.captions]
    return Inputs(features.audio, features.text[first], captions, features.classes, features.descriptions)


def build_model(corpus: Corpus, train: Inputs) -> DualEncoder:
    """Encoders with fresh weights for the inputs of `load_inputs`, drawn from torch's present seed.

    `encode_audio` takes rows of `Inputs.audio` as float32, `encode_text` what `text_inputs` gives.

    Args:
        corpus: names the encoders and their sizes.
        train: training captions, for the tokenizer, and the width of frozen features.
    """
    if corpus.encoders == "frozen":
        hidden, dropout = 8 * corpus.model.audio.width, corpus.model.dropout
        audio = PatchHead(train.audio.shape[2], hidden, dropout)
        return DualEncoder(audio, _Given(_minilm(corpus), train.text.shape[1]), corpus.model)
    model = build_dual_encoder(
        corpus.model, SAMPLE_RATE, Vocabulary.train(train.captions, corpus.model.text.vocabulary)
    )
    model.audio.front_end = _FromFrames()
    return model


def text_inputs(model: DualEncoder, inputs: Inputs, captions: list[str] | None = None) -> Tensor:
    """What `encode_text` takes for the captions of a split, or for other captions of its clips.

    Returns:
        int64 [n, tokens], or float32 [n, width] of the frozen encoder.
    """
    if captions is None and inputs.text.shape[1]:
        return inputs.text
    return model.text.tokenize(captions if captions is not None else inputs.captions)


class LogMelFrames(AudioEncoder):
    """The log-mel of `conv`, which has nothing to learn, as "patches"."""

    def __init__(self, mel_bins: int) -> None:
        super().__init__()
        self.sample_rate, self.output_dim = SAMPLE_RATE, mel_bins
        self.log_mel = LogMel(SAMPLE_RATE, mel_bins)

    def patches(self, audio: Tensor) -> Tensor:
        """float32 [batch, samples] -> [batch, frames, mel_bins]."""
        return self.log_mel(audio).squeeze(1).transpose(1, 2)


class _FromFrames(nn.Module):
    """Stands where `conv` has its log-mel: [batch, frames, mel_bins] -> [batch, 1, mel_bins, frames]."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.transpose(1, 2).unsqueeze(1)


class PatchHead(AudioEncoder):
    """Over the patches of a frozen encoder: a linear map, and the GRU that `conv` has over its frames."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.sample_rate, self.output_dim = SAMPLE_RATE, hidden
        self.patch = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.context = nn.GRU(hidden, hidden // 2, batch_first=True, bidirectional=True)

    def forward(self, patches: Tensor) -> Tensor:
        """float32 [batch, patches, inputs] -> [batch, hidden]."""
        mapped = self.patch(patches)
        states, _ = self.context(mapped)
        return states.amax(dim=1) + states.mean(dim=1) + mapped.amax(dim=1)


class _Given(TextEncoder):
    """Takes the features of a frozen encoder as they are; `tokenize` computes them."""

    def __init__(self, encoder: TextEncoder, width: int) -> None:
        super().__init__()
        self.output_dim = width
        self._encoder = [encoder]  # in a list: its weights are none of the trained model's

    @torch.no_grad()
    def tokenize(self, captions: list[str]) -> Tensor:
        encoder = self._encoder[0]
        return torch.cat([encoder(encoder.tokenize(captions[at : at + 64])) for at in range(0, len(captions), 64)])

    def forward(self, features: Tensor) -> Tensor:
        return features


def _minilm(corpus: Corpus) -> TextEncoder:
    return FolderTextEncoder(minilm_folder(), corpus.model.text.max_tokens).freeze()


def _read(shards: ShardList, sample_rate: int, clip_seconds: float) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """The good clips of a split, cropped in the middle."""
    for path, count in zip(shards.paths, shards.counts, strict=True):
        for raw in read_shard(path, 0, count):
            try:
                audio, description = open_clip(raw, sample_rate)
            except BadSample:
                continue  # training names it; here all arms go without it alike
            yield raw.key, fit_length(audio, round(clip_seconds * sample_rate), None), description
