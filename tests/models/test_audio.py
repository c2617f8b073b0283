"""Audio encoders: shapes, quiet and short sounds, order, and the registry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ask_dist.config import AudioModel, Model
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, LogMel, build_audio_encoder, register_audio_encoder

RATE = 8000


def tone(hertz: float, seconds: float = 0.5) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(RATE * seconds)) / RATE)


def encoder(mel_bins: int = 20, width: int = 8) -> AudioEncoder:
    torch.manual_seed(0)
    return build_audio_encoder(Model(audio=AudioModel(width=width, mel_bins=mel_bins)), RATE).eval()


def test_a_frame_comes_each_20_ms():
    assert LogMel(RATE, 20)(torch.zeros(3, 2 * RATE)).shape == (3, 1, 20, 101)


def test_a_tone_is_loudest_in_a_higher_bin_when_it_is_higher():
    bins = [int(LogMel(RATE, 20)(tone(hertz).unsqueeze(0)).mean(dim=3).argmax()) for hertz in (200, 500, 1500, 3500)]
    assert bins == sorted(set(bins))


def test_ten_times_the_amplitude_adds_ln_100_over_4():
    quiet, loud = (LogMel(RATE, 20)(scale * tone(440).unsqueeze(0)).amax() for scale in (0.1, 1.0))
    assert float(loud - quiet) == pytest.approx(math.log(100.0) / 4, abs=1e-3)


def test_under_bf16_the_front_end_stays_in_fp32():
    front_end, quiet = LogMel(RATE, 20), 1e-3 * tone(440).unsqueeze(0)
    wanted = front_end(quiet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(front_end(quiet), wanted, atol=0, rtol=0)


@pytest.mark.parametrize("mel_bins", [1, 16, 20, 64])
@pytest.mark.parametrize("seconds", [0.1, 0.33, 2.0])
def test_any_length_and_any_number_of_bins_give_one_vector_a_clip(mel_bins, seconds):
    network = encoder(mel_bins)
    vectors = network(torch.randn(3, int(seconds * RATE)))
    assert vectors.shape == (3, network.output_dim) == (3, 64)
    assert torch.isfinite(vectors).all()


def test_silence_has_a_finite_vector_and_finite_gradients():
    network = encoder()
    vectors = network(torch.zeros(2, RATE))
    vectors.square().sum().backward()
    assert torch.isfinite(vectors).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_a_clips_vector_does_not_depend_on_the_others_in_the_batch():
    network, clips = encoder(), torch.randn(4, RATE, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([network(clip.unsqueeze(0)) for clip in clips])
    torch.testing.assert_close(network(clips), alone, atol=1e-5, rtol=0)


def test_the_order_of_sounds_matters():
    low, high = tone(300), tone(2000)
    one, other = encoder()(torch.stack([torch.cat([low, high]), torch.cat([high, low])]))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) < 0.9999


def test_a_width_that_the_norms_cant_split_is_refused_with_one_that_works():
    with pytest.raises(InputError, match=r"model\.audio\.width=20 is no multiple of 8.*use 24"):
        encoder(width=20)
    assert encoder(width=24).output_dim == 192


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"model\.audio\.name='wav2nothing' is not registered; known: .*conv"):
        build_audio_encoder(Model(audio=AudioModel(name="wav2nothing")), RATE)


def test_anybodys_encoder_can_be_registered():
    class Loudness(AudioEncoder):
        sample_rate, output_dim = RATE, 1

        def forward(self, audio: Tensor) -> Tensor:
            return audio.square().mean(dim=1, keepdim=True)

    register_audio_encoder("test-loudness")(lambda config, sample_rate: Loudness())
    built = build_audio_encoder(Model(audio=AudioModel(name="test-loudness")), RATE)
    torch.testing.assert_close(built(torch.full((2, 10), 0.5)), torch.full((2, 1), 0.25))
    with pytest.raises(InputError, match=r"data\.sample_rate=16000 does not fit .*test-loudness; set it to 8000"):
        build_audio_encoder(Model(audio=AudioModel(name="test-loudness")), 2 * RATE)
