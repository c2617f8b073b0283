"""AST and Whisper's encoder out of folders: equal to transformers' own, front end included."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ask_dist.errors import InputError
from ask_dist.models.spectrogram_transformers import AstEncoder, WhisperEncoder
from tests.models.conftest import needs_pretrained
from tests.models.towers import save_ast, save_whisper

RATE = 16_000


def sounds(seconds: float) -> Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    tones = torch.stack([(2 * math.pi * hertz * time).sin() for hertz in (300.0, 1500.0)])
    return 0.3 * tones + 0.01 * torch.randn(tones.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ast(tmp_path_factory) -> Path:
    needs_pretrained()
    return save_ast(tmp_path_factory.mktemp("ast"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    needs_pretrained()
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.mark.parametrize("seconds", [0.4, 1.0, 2.0])
def test_ast_gives_what_transformers_gives(ast, seconds):
    from transformers import ASTFeatureExtractor, ASTModel

    encoder, audio = AstEncoder(ast).eval(), sounds(seconds)
    features = ASTFeatureExtractor.from_pretrained(ast)(list(audio.numpy()), sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(encoder.front_end(audio), features["input_values"], atol=1e-4, rtol=0)
    with torch.no_grad():
        wanted = ASTModel.from_pretrained(ast).eval()(**features).pooler_output
        torch.testing.assert_close(encoder(audio), wanted, atol=1e-4, rtol=0)
    assert encoder.output_dim == wanted.shape[1] == 16


@pytest.mark.parametrize("seconds", [0.41, 2.0])
def test_whisper_gives_the_mean_of_what_transformers_gives_for_the_clip(whisper, seconds):
    from transformers import WhisperFeatureExtractor, WhisperModel

    encoder, audio = WhisperEncoder(whisper).eval(), sounds(seconds)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    features = extractor(list(audio.numpy()), sampling_rate=RATE, return_tensors="pt")["input_features"]
    torch.testing.assert_close(encoder.front_end(audio), features, atol=1e-4, rtol=0)
    with torch.no_grad():
        states = WhisperModel.from_pretrained(whisper).eval().encoder(features).last_hidden_state
        wanted = states[:, : math.ceil(seconds * 50)].mean(dim=1)  # a state each 20 ms
        torch.testing.assert_close(encoder(audio), wanted, atol=1e-4, rtol=0)


def test_whispers_decoder_is_left_out(whisper):
    assert not [name for name, _ in WhisperEncoder(whisper).named_parameters() if "decoder" in name]


def test_clips_longer_than_whisper_takes_are_refused(whisper):
    with pytest.raises(InputError, match=r"data\.clip_seconds=2\.5 is more than Whisper takes; set it to 2"):
        WhisperEncoder(whisper)(sounds(2.5))


def test_under_bf16_the_front_end_stays_in_fp32(ast):
    encoder, audio = AstEncoder(ast).bfloat16().eval(), 1e-3 * sounds(1.0)
    torch.testing.assert_close(encoder.front_end(audio), AstEncoder(ast).front_end(audio), atol=0, rtol=0)
    assert encoder(audio).dtype == torch.bfloat16


def test_a_folder_of_another_network_is_refused_in_one_line(whisper):
    with pytest.raises(InputError, match="is no ASTModel for transformers") as error:
        AstEncoder(whisper)
    assert "\n" not in str(error.value)
