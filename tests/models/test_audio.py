"""Audio encoders: shapes, quiet and short sounds, order, the registry, and masks of log-mels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ask_dist.config import AudioModel, Augment, Model
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, LogMel, SpecAugment, build_audio_encoder, register_audio_encoder
from tests.models.conftest import needs_pretrained
from tests.models.towers import save_ast, save_clap, save_cnn14, save_whisper

RATE = 8000
CLIPS, FRAMES, BANDS = 64, 50, 20


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


SAVED = {"clap-htsat": save_clap, "ast": save_ast, "whisper": save_whisper, "cnn14": save_cnn14}
RATES = {"ast": 16000, "whisper": 16000, "cnn14": 32000, "yamnet": 16000}


def make_tower(name: str, folder: Path) -> AudioEncoder:
    """A small one of each kind with random weights, or YAMNet; at 8 kHz, or at the rate that it needs."""
    if name == "conv":
        return encoder()
    needs_pretrained()
    torch.manual_seed(0)
    source = str(SAVED[name](folder / name)) if name in SAVED else None
    return build_audio_encoder(Model(audio=AudioModel(name=name, source=source)), RATES.get(name, RATE)).eval()


@pytest.mark.parametrize("name", ["conv", "clap-htsat", "ast", "whisper", "cnn14", "yamnet"])
@torch.no_grad()
def test_a_clip_of_its_own_length_has_the_same_vector_alone_and_beside_longer_ones(name, tmp_path):
    network, heard = make_tower(name, tmp_path), []
    network.register_forward_pre_hook(lambda tower, inputs: heard.append(tuple(inputs[0].shape)))
    step = network.sample_rate // 4
    clips = 0.1 * torch.randn(5, 4 * step, generator=torch.Generator().manual_seed(1))
    lengths = step * torch.tensor([2, 4, 1, 2, 4])
    together = network.by_length(clips, lengths)
    assert heard == [(1, step), (2, 2 * step), (2, 4 * step)]
    alone = torch.cat([network(clip[None, :length]) for clip, length in zip(clips, lengths.tolist(), strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(network.by_length(clips, None), network(clips))


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


def widths(masked: Tensor) -> Tensor:
    """How many of each clip's columns are masked along the last axis, which must lie side by side."""
    column = masked.all(dim=1)
    edges = torch.diff(column.int(), dim=1, prepend=torch.zeros(len(column), 1, dtype=torch.int32))
    assert (edges == 1).sum(dim=1).le(1).all()
    return column.sum(dim=1)


@pytest.mark.parametrize(("time", "frequency"), [(0.4, 0.0), (0.0, 0.5)])
def test_a_mask_of_each_clips_own_is_no_longer_than_its_share(time, frequency):
    torch.manual_seed(0)
    log_mel = torch.randn(CLIPS, FRAMES, BANDS) + 3.0
    changed = SpecAugment(time, frequency)(log_mel) != log_mel
    along, length = (changed.transpose(1, 2), 0.4 * FRAMES) if time else (changed, 0.5 * BANDS)
    masked = widths(along)
    assert torch.equal(along, along.all(dim=1, keepdim=True).expand_as(along))
    assert masked.max() <= length
    assert 0.3 * length < masked.float().mean() < 0.6 * length  # uniform from 0
    assert masked.unique().numel() > 5


def test_what_is_masked_has_the_mean_and_equal_seeds_draw_equal_masks():
    log_mel = torch.randn(CLIPS, 1, FRAMES, BANDS)
    augment = SpecAugment(0.3, 0.3)
    torch.manual_seed(1)
    masked = augment(log_mel)
    assert masked[masked != log_mel].unique().item() == pytest.approx(float(log_mel.mean()))
    torch.manual_seed(1)
    assert torch.equal(augment(log_mel), masked)
    assert not torch.equal(augment(log_mel), masked)


def test_without_shares_nothing_is_drawn():
    torch.manual_seed(2)
    before = torch.get_rng_state()
    log_mel = torch.randn(2, 3, 4)
    torch.set_rng_state(before)
    assert torch.equal(SpecAugment(0.0, 0.0)(log_mel), log_mel)
    assert torch.equal(torch.get_rng_state(), before)


# How each is made, its rate, and its part that takes the log-mel.
TOWERS = {
    "conv": (None, 16_000, "blocks"),
    "cnn14": (save_cnn14, 32_000, "bn0"),
    "ast": (save_ast, 16_000, "network"),
    "whisper": (save_whisper, 16_000, "network"),
    "clap-htsat": (save_clap, 8000, "network"),
    "yamnet": (None, 16_000, "network.0"),
}


@torch.no_grad()
def network_input(tower: AudioEncoder, part: str, audio: Tensor) -> Tensor:
    """What the network behind the log-mel takes in, clip by clip."""
    seen: list[Tensor] = []

    def note(_module: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        seen.append(inputs[0] if inputs else next(iter(named.values())))

    hook = tower.get_submodule(part).register_forward_pre_hook(note, with_kwargs=True)
    tower(audio)
    hook.remove()
    return seen[0].reshape(len(audio), -1)


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_masks_what_its_network_takes_in_training_alone(name: str, tmp_path: Path) -> None:
    save, rate, part = TOWERS[name]
    if name not in ("conv", "cnn14"):
        needs_pretrained()
    source = None if save is None else str(save(tmp_path / "tower"))
    tower = build_audio_encoder(Model(audio=AudioModel(name=name, source=source, width=8)), rate)
    audio = 0.3 * torch.randn(3, rate // 2, generator=torch.Generator().manual_seed(0))
    plain = network_input(tower.train(), part, audio)
    tower.augment(Augment(time_mask=0.8, frequency_mask=0.8))
    torch.manual_seed(7)
    masked = network_input(tower.train(), part, audio)
    changed = masked != plain
    assert masked.shape == plain.shape
    assert changed.any(dim=1).all()
    assert not changed.all(dim=1).any()
    assert masked[changed].unique().numel() == 1
    torch.manual_seed(7)
    assert torch.equal(network_input(tower, part, audio), masked)
    assert torch.equal(network_input(tower.eval(), part, audio), plain)


class NoLogMel(AudioEncoder):
    """Another package's, on the waveform."""


def test_a_tower_without_a_log_mel_is_refused():
    NoLogMel().augment(Augment(mix_share=0.5))
    with pytest.raises(InputError, match=r"augment.time_mask and frequency_mask \(0.2\) .* NoLogMel does not have"):
        NoLogMel().augment(Augment(frequency_mask=0.2))
