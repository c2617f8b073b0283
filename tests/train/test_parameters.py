"""Groups of parameters: who decays, whose rate is smaller, who waits for a frozen tower."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from ask_dist.config import SIGMOID, AudioModel, Model, TextModel
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.encoder import Encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train.parameters import encoders, parameter_groups


class Tower(Encoder):
    """What comes before the blocks is registered in part after them."""

    before_blocks = ("positions",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 4)
        self.inner = nn.ModuleList([nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)])
        self.positions = nn.Embedding(3, 4)
        self.head = nn.Sequential(nn.LayerNorm(4))


def model(freeze: bool = False, unfreeze_at: float | None = None) -> nn.Module:
    text = TextModel(width=16, layers=2, heads=2, max_tokens=8, freeze=freeze, unfreeze_at=unfreeze_at)
    settings = Model(embedding_dim=12, audio=AudioModel(width=8, mel_bins=20), text=text, **SIGMOID)
    return build_dual_encoder(settings, 8000, Vocabulary.train(["a dog", "rain"], 300))


def by_name(module: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[parameter]: group[key] for group in groups for parameter in group["params"]}


def test_without_layer_decay_there_are_two_groups_and_only_matrices_decay():
    whole = model()
    decayed, plain = parameter_groups(whole, 0.02)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.02, 0.0)
    assert {group["scale"] for group in (decayed, plain)} == {1.0}
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    named = by_name(whole, [plain], "weight_decay")
    scalars, inner = {"log_logit_scale", "logit_bias"}, {"text.norm.weight", "text.layers.layers.0.norm1.bias"}
    assert scalars | inner | {"audio_projection.0.bias"} <= set(named)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(whole.parameters()))


def test_the_rate_falls_from_the_last_block_down():
    whole = model()
    scales = by_name(whole, parameter_groups(whole, 0.02, layer_decay=0.5), "scale")
    assert set(scales) == {name for name, _ in whole.named_parameters()}
    wanted = {
        "text.embedding.weight": 0.25,
        "text.layers.layers.0.linear1.weight": 0.5,
        "text.layers.layers.1.norm2.bias": 1.0,
        "text.norm.weight": 1.0,
        "audio.blocks.0.convolution.weight": 0.125,
        "audio.blocks.3.norm.bias": 1.0,
        "audio.context.weight_hh_l0": 1.0,
        "text_projection.0.weight": 1.0,
        "log_logit_scale": 1.0,
        "logit_bias": 1.0,
    }
    assert {name: scales[name] for name in wanted} == wanted


def test_an_encoder_can_name_what_comes_before_its_blocks():
    tower = Tower()
    scales = by_name(tower, parameter_groups(tower, 0.02, layer_decay=0.5), "scale")
    wanted = {"stem": 0.25, "inner.0": 0.5, "inner.2": 1.0, "positions": 0.25, "head.0": 1.0}
    assert {name.rpartition(".")[0]: scale for name, scale in scales.items()} == wanted


def test_a_frozen_tower_is_left_out_and_one_that_thaws_has_groups_of_its_own():
    frozen = model(freeze=True)
    assert not [n for n in by_name(frozen, parameter_groups(frozen, 0.02), "scale") if n.startswith("text.")]
    thawing = model(freeze=True, unfreeze_at=0.5)
    towers = by_name(thawing, parameter_groups(thawing, 0.02), "tower")
    assert set(towers) == {name for name, _ in thawing.named_parameters()}
    assert {name for name, tower in towers.items() if tower == "text"} == {n for n in towers if n.startswith("text.")}
    assert {tower for name, tower in towers.items() if not name.startswith("text.")} == {None}


@pytest.mark.parametrize("progress", [0.0, 0.49])
def test_until_its_share_of_the_run_a_tower_is_in_evaluation_mode_and_has_no_gradient(progress):
    whole = model(freeze=True, unfreeze_at=0.5).train()
    tokens = whole.text.tokenize(["a dog", "rain"])
    (tower,) = [encoder for encoder in encoders(whole).values() if encoder.thaws_at]

    def gradient() -> Tensor | None:
        whole.zero_grad()
        whole.encode_text(tokens).square()[:, 0].sum().backward()
        return whole.text.embedding.weight.grad

    tower.advance(progress)
    assert gradient() is None
    assert whole.text_projection[0].weight.grad is not None
    assert not any(module.training for module in tower.modules())
    assert not any(module.training for module in whole.train().text.modules())
    tower.advance(0.5)
    thawed = gradient()
    assert thawed is not None
    assert thawed.abs().sum() > 0
    assert all(module.training for module in tower.modules())
    tower.advance(progress)  # a run that goes on from an earlier checkpoint
    assert gradient() is None


def test_a_tower_that_is_frozen_until_the_start_learns_from_the_start():
    whole = model(freeze=True, unfreeze_at=0.0)
    whole.encode_text(whole.text.tokenize(["a dog", "rain"]))[:, 0].sum().backward()
    assert whole.text.training
    assert all(weights.grad is not None for weights in whole.text.parameters())
    assert {group["tower"] for group in parameter_groups(whole, weight_decay=0.1)} == {None}
