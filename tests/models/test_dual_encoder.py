"""Two encoders on one sphere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ask_dist.config import SIGMOID
from ask_dist.models.dual_encoder import build_dual_encoder

AUDIO = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
CAPTIONS = ["a drum", "a viola, then a drum", "three loud notes", ""]


def test_features_are_unit_rows_and_the_scale_is_exponentiated(model):
    features = model(AUDIO, model.text.tokenize(CAPTIONS))
    for rows in (features.audio_features, features.text_features):
        assert rows.shape == (4, 12)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    assert features.logit_scale.shape == ()
    assert features.logit_scale.item() == pytest.approx(14.3, rel=1e-5)
    assert features.logit_bias.item() == 0.0


def test_there_is_a_bias_to_learn_for_the_sigmoid_loss_alone(model, settings, vocabulary):
    assert "logit_bias" not in model.state_dict()
    biased = build_dual_encoder(settings.model_copy(update=SIGMOID), 8000, vocabulary)
    features = biased(AUDIO, biased.text.tokenize(CAPTIONS))
    assert features.logit_scale.item() == pytest.approx(10.0, rel=1e-5)
    assert (features.logit_bias.shape, features.logit_bias.item()) == ((), -10.0)
    features.logit_bias.backward()
    assert biased.logit_bias.grad.tolist() == [1.0]


def test_each_side_can_be_encoded_alone(model):
    features = model(AUDIO, model.text.tokenize(CAPTIONS))
    torch.testing.assert_close(model.encode_audio(AUDIO), features.audio_features)
    torch.testing.assert_close(model.encode_text(model.text.tokenize(CAPTIONS)), features.text_features)


def test_the_scale_is_capped(model):
    with torch.no_grad():
        model.log_logit_scale.fill_(10.0)
    assert model(AUDIO, model.text.tokenize(CAPTIONS)).logit_scale.item() == 100.0


@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log_scale=st.floats(-3.0, 20.0, width=32), largest=st.floats(0.1, 200.0))
def test_a_capped_scale_has_a_gradient_that_leads_back(model, log_scale, largest):
    model.zero_grad()
    model.logit_scale_max = largest
    with torch.no_grad():
        model.log_logit_scale.fill_(log_scale)
    scale = model.logit_scale
    scale.backward()
    assert scale.item() == pytest.approx(min(math.exp(log_scale), largest), rel=1e-5)
    assert model.log_logit_scale.grad.item() == pytest.approx(math.exp(log_scale), rel=1e-5)


def test_a_scale_above_the_cap_begins_at_the_cap(settings, vocabulary):
    update = {"logit_scale_init": 120.0, "logit_scale_max": 50.0}
    model = build_dual_encoder(settings.model_copy(update=update), 8000, vocabulary)
    assert model.log_logit_scale.item() == pytest.approx(math.log(50.0))


def test_features_are_fp32_under_bf16(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(AUDIO, model.text.tokenize(CAPTIONS))
    assert features.audio_features.dtype == features.text_features.dtype == torch.float32
    torch.testing.assert_close(features.text_features.norm(dim=1), torch.ones(4))


def test_every_parameter_learns(model):
    features = model.train()(AUDIO, model.text.tokenize(CAPTIONS))
    logits = features.logit_scale * features.audio_features @ features.text_features.T
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
