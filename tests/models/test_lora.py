"""Adapters: which weights learn, what a merged model says, and that it is saved as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ask_dist import config as configuration
from ask_dist.errors import InputError
from ask_dist.export.clap import write_clap
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.lora import adapted, add_adapters, merged
from ask_dist.models.saved import load_model, save_model
from ask_dist.models.text import Vocabulary
from ask_dist.train.recompute import recompute_blocks
from tests.models.conftest import CAPTIONS, needs_pretrained
from tests.models.towers import save_clap

RATE = 8000


def config_of(folder: Path, **lora: object) -> configuration.Config:
    audio, text = {"name": "clap-htsat", "source": str(folder)}, {"name": "clap-text", "source": str(folder)}
    model = {
        "embedding_dim": 12,
        "projection": "none",
        "audio": audio | {"lora": lora},
        "text": text | {"max_tokens": 16, "lora": lora},
    }
    return configuration.parse({"name": "r", "data": {"train": "x", "sample_rate": RATE}, "model": model})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    needs_pretrained()
    pytest.importorskip("peft", reason="needs the extra ask-dist[pretrained]")
    return save_clap(tmp_path_factory.mktemp("clap") / "folder")


@torch.no_grad()
def embeddings(model: DualEncoder) -> tuple[Tensor, Tensor]:
    audio = 0.1 * torch.randn(3, RATE, generator=torch.Generator().manual_seed(0))
    return model.eval().encode_audio(audio), model.encode_text(model.text.tokenize(CAPTIONS))


def taught(model: DualEncoder) -> DualEncoder:
    """As after a training: the adapters have left zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_adapters_change_nothing_at_first_and_learn_alone(folder, vocabulary):
    config = config_of(folder)
    model = build_dual_encoder(config.model, RATE, vocabulary)
    before = embeddings(model)
    assert not adapted(model)
    add_adapters(model, config.model)
    assert adapted(model)
    for found, wanted in zip(embeddings(model), before, strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learn == {name for name, _ in model.named_parameters() if ".lora_" in name} | {"log_logit_scale"}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in learn if ".lora_" in name} == {"query", "value"}


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
def test_a_merged_model_says_what_the_adapted_one_says_and_is_saved_as_any_other(folder, vocabulary, targets, tmp_path):
    config = config_of(folder, rank=4, targets=targets)
    model = build_dual_encoder(config.model, RATE, vocabulary)
    before = embeddings(model)
    add_adapters(model, config.model)
    names = list(model.state_dict())
    wanted = embeddings(taught(model))
    assert (wanted[0] - before[0]).abs().max() > 1e-2
    assert (wanted[1] - before[1]).abs().max() > 1e-2
    whole = merged(model)
    assert list(model.state_dict()) == names  # the model that is trained is left as it is
    save_model(tmp_path / "model", whole)
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    loaded = load_model(tmp_path)[1]
    for found, merged_rows, adapted_rows in zip(embeddings(loaded), embeddings(whole), wanted, strict=True):
        torch.testing.assert_close(found, merged_rows, atol=0, rtol=0)
        torch.testing.assert_close(found, adapted_rows, atol=1e-5, rtol=0)
    write_clap(tmp_path / "exported", loaded, config)
    exported = build_dual_encoder(config_of(tmp_path / "exported").model, RATE, vocabulary)
    for found, wanted_rows in zip(embeddings(exported), embeddings(whole), strict=True):
        torch.testing.assert_close(found, wanted_rows, atol=0, rtol=0)


def small(vocabulary: Vocabulary, rate: int = RATE, **towers: dict[str, object]) -> DualEncoder:
    """A model of small towers, or of those that are named, with the adapters that they ask for."""
    pytest.importorskip("peft", reason="needs the extra ask-dist[pretrained]")
    sizes = {"audio": {"width": 8, "mel_bins": 16}, "text": {"width": 16, "layers": 2, "heads": 2, "max_tokens": 8}}
    model = {"embedding_dim": 8} | {side: sizes[side] | towers.get(side, {}) for side in sizes}
    config = configuration.parse({"name": "r", "data": {"train": "x", "sample_rate": rate}, "model": model})
    torch.manual_seed(0)
    built = build_dual_encoder(config.model, rate, vocabulary)
    add_adapters(built, config.model)
    return built


def gradients(model: DualEncoder, samples: int) -> dict[str, Tensor | None]:
    """Of all weights that learn."""
    audio = 0.1 * torch.randn(3, samples, generator=torch.Generator().manual_seed(0))
    features = model(audio, model.text.tokenize(CAPTIONS[:3]))
    (features.audio_features * features.text_features).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_of_single_convolutions_are_asked_learn_and_are_merged(vocabulary, recompute):
    needs_pretrained()
    model = small(vocabulary, 16_000, audio={"name": "yamnet", "lora": {"targets": ["network.6", "network.11"]}})
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    if recompute:
        recompute_blocks(model)
    audio = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.eval().encode_audio(audio)
        wanted = taught(model).encode_audio(audio)
        torch.testing.assert_close(merged(model).encode_audio(audio), wanted, atol=1e-4, rtol=0)
    assert (wanted - before).abs().max() > 1e-2
    found = gradients(model.train(), 16_000)
    assert all(found[name].abs().max() > 0 for name in found if ".lora_" in name)


def test_every_linear_layer_means_those_whose_adapters_learn(vocabulary):
    model = small(vocabulary, text={"lora": {"targets": "all-linear"}}).train()
    found = {name: gradient for name, gradient in gradients(model, 4000).items() if ".lora_" in name}
    layers = {name.split(".lora_")[0].removeprefix("text.layers.layers.") for name in found}
    assert layers == {"0.linear1", "0.linear2", "1.linear1", "1.linear2"}
    assert all(gradient is not None for gradient in found.values())


@pytest.mark.parametrize("target", ["out_proj", "self_attn"])
def test_layers_that_attention_reads_past_an_adapter_are_refused(vocabulary, target):
    with pytest.raises(InputError, match=rf"^model\.text\.lora\.targets=\['{target}'\]: .*; name other layers, "):
        small(vocabulary, text={"lora": {"targets": [target]}})


def test_a_model_without_adapters_is_merged_already(model):
    assert merged(model) is model


def test_names_that_no_layer_has_are_refused(folder, vocabulary):
    config = config_of(folder, targets=["qvery"])
    with pytest.raises(InputError, match=r"^model\.audio\.lora\.targets=\['qvery'\]: .*; name other layers$"):
        add_adapters(build_dual_encoder(config.model, RATE, vocabulary), config.model)
