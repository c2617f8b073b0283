"""CLAP out of a folder: both towers give what transformers gives, and learn."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ask_dist.config import AudioModel, Model, TextModel
from ask_dist.errors import InputError
from ask_dist.models.clap import ClapAudioEncoder
from ask_dist.models.dual_encoder import LOGIT_SCALE, DualEncoder, build_dual_encoder
from ask_dist.train.parameters import parameter_groups
from tests.models.conftest import needs_pretrained
from tests.models.towers import save_clap

RATE = 8000
CAPTIONS = ["a dog barks", "rain falls on a tin roof", "three loud notes"]


def sounds(seconds: float, clips: int = 3) -> Tensor:
    """Tones, each an octave above the one before, in some noise."""
    time = torch.arange(round(seconds * RATE)) / RATE
    tones = (2 * torch.pi * 200 * 2 ** torch.arange(clips)[:, None] * time).sin()
    return 0.3 * tones + 0.01 * torch.randn(tones.shape, generator=torch.Generator().manual_seed(0))


def both(folder: Path, **settings: Any) -> Model:
    towers = {"audio": AudioModel(name="clap-htsat", source=str(folder)), "text": clap_text(folder)}
    return Model(**{"embedding_dim": 12, "projection": "none", **towers, **settings})


def clap_text(folder: Path) -> TextModel:
    return TextModel(name="clap-text", source=str(folder), max_tokens=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    needs_pretrained()
    return save_clap(tmp_path_factory.mktemp("clap") / "plain")


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Path:
    needs_pretrained()
    return save_clap(tmp_path_factory.mktemp("clap") / "fused", enable_fusion=True)


@pytest.fixture
def model(folder, vocabulary) -> DualEncoder:
    return build_dual_encoder(both(folder), RATE, vocabulary).eval()


@pytest.mark.parametrize("seconds", [2.0, 1.0, 0.7])
@pytest.mark.parametrize("kind", ["folder", "fused"])
def test_the_front_end_gives_what_the_feature_extractor_gives(kind, seconds, request):
    encoder = ClapAudioEncoder(request.getfixturevalue(kind))
    audio = sounds(seconds)
    wanted = encoder.extractor(list(audio.numpy()), sampling_rate=RATE, return_tensors="pt")["input_features"]
    torch.testing.assert_close(encoder.front_end(audio), wanted.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["folder", "fused"])
def test_both_towers_of_a_whole_model_give_its_own_embeddings(kind, request, vocabulary):
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    folder, audio = request.getfixturevalue(kind), sounds(2.0)
    model = build_dual_encoder(both(folder), RATE, vocabulary).eval()
    theirs, extractor = ClapModel.from_pretrained(folder).eval(), ClapFeatureExtractor.from_pretrained(folder)
    heard = extractor(list(audio.numpy()), sampling_rate=RATE, return_tensors="pt")
    heard["is_longer"] = torch.zeros(3, 1, dtype=torch.bool)  # transformers calls one of the short clips long
    read = AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = theirs(read["input_ids"], heard["input_features"].float(), heard["is_longer"], read["attention_mask"])
        ours = model(audio, model.text.tokenize(CAPTIONS))
    torch.testing.assert_close(ours.audio_features, wanted.audio_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.text_features, wanted.text_embeds, atol=1e-5, rtol=0)
    assert (ours.audio_features @ ours.audio_features.T).fill_diagonal_(-1).max() < 0.9999  # they differ at all


def test_it_trains_and_its_batch_norm_keeps_its_statistics(model):
    model.train()
    norm = model.audio.network.audio_model.audio_encoder.batch_norm
    before = norm.running_mean.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        features = model(sounds(2.0), model.text.tokenize(CAPTIONS))
        logits = 10.0 * features.audio_features @ features.text_features.T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert norm.weight.grad.abs().sum() > 0
    assert torch.equal(norm.running_mean, before)
    assert not norm.training


def test_a_frozen_tower_stays_and_the_other_learns(folder, vocabulary):
    audio = AudioModel(name="clap-htsat", source=str(folder), freeze=True)
    model = build_dual_encoder(both(folder, audio=audio), RATE, vocabulary).train()
    model(sounds(2.0), model.text.tokenize(CAPTIONS)).audio_features.sum()
    assert not any(parameter.requires_grad for parameter in model.audio.parameters())
    assert not any(module.training for module in model.audio.modules())
    assert all(parameter.requires_grad for parameter in model.text.parameters())


@pytest.mark.parametrize(
    ("settings", "rate", "line"),
    [
        ({}, 16_000, r"data\.sample_rate=16000 does not fit model\.audio\.name=clap-htsat; set it to 8000"),
        ({"embedding_dim": 16}, RATE, r"width 12 and model\.embedding_dim=16: set model\.embedding_dim=12"),
        ({"audio": AudioModel(name="clap-htsat")}, RATE, r"model\.audio\.source is missing; name"),
        ({"audio": AudioModel(name="clap-htsat", source="/nowhere")}, RATE, r"/nowhere: there is no such folder"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, vocabulary, settings, rate, line):
    with pytest.raises(InputError, match=line) as error:
        build_dual_encoder(both(folder, **settings), rate, vocabulary)
    assert "\n" not in str(error.value)


def test_longer_clips_than_the_model_takes_are_refused(model):
    with pytest.raises(InputError, match=r"data\.clip_seconds=3 is more than .* set it to 2"):
        model.encode_audio(sounds(3.0))


def test_a_folder_without_the_front_ends_settings_is_refused(tmp_path):
    folder = save_clap(tmp_path / "clap")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"holds no preprocessor_config\.json"):
        ClapAudioEncoder(folder)


def test_a_folder_of_another_network_is_refused_rather_than_drawn_at_random(tmp_path, folder, vocabulary):
    from transformers import RobertaConfig, RobertaModel

    other = save_clap(tmp_path / "other")
    RobertaModel(
        RobertaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(other)
    with pytest.raises(InputError, match="is no ClapTextModelWithProjection") as error:
        build_dual_encoder(both(folder, text=clap_text(other)), RATE, vocabulary)
    assert "\n" not in str(error.value)


def test_silence_gives_finite_embeddings(model):
    assert np.isfinite(model.encode_audio(torch.zeros(2, 2 * RATE)).detach().numpy()).all()


def test_the_contrast_goes_on_with_the_scale_of_a_whole_model(folder, tmp_path, vocabulary):
    from transformers import ClapModel

    theirs = ClapModel.from_pretrained(folder)
    torch.nn.init.constant_(theirs.logit_scale_a, 3.0)
    shutil.copytree(folder, tmp_path / "clap")
    theirs.save_pretrained(tmp_path / "clap")
    own = math.exp(3.0)
    for settings, wanted in [({}, own), ({"projection": "mlp"}, LOGIT_SCALE), ({"logit_scale_init": 5.0}, 5.0)]:
        model = build_dual_encoder(both(tmp_path / "clap", **settings), RATE, vocabulary)
        assert float(model.logit_scale.detach()) == pytest.approx(wanted, rel=1e-5)
    other = both(tmp_path / "clap").model_copy(update={"text": clap_text(folder)})
    assert float(build_dual_encoder(other, RATE, vocabulary).logit_scale.detach()) == pytest.approx(LOGIT_SCALE)


def test_biases_by_relative_position_have_no_weight_decay(model):
    tables = [weights for name, weights in model.named_parameters() if "relative_position_bias_table" in name]
    assert tables
    assert all(table.ndim == 2 for table in tables)
    free = {
        weights for group in parameter_groups(model, 0.1) if not group["weight_decay"] for weights in group["params"]
    }
    assert free.issuperset(tables)
