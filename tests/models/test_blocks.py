"""The blocks of every kind of tower, in order of depth: the input reaches the first first, and each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ask_dist.config import AudioModel, Model, TextModel
from ask_dist.models.audio import AudioEncoder
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.encoder import Encoder
from ask_dist.models.minilm import FolderTextEncoder
from ask_dist.models.text import TextEncoder
from tests.models.conftest import CAPTIONS, needs_pretrained
from tests.models.towers import TEXT, save_ast, save_clap, save_cnn14, save_tokenizer, save_whisper

SMALL = {"width": 16, "layers": 3, "heads": 2, "max_tokens": 16}


def audio(name: str, source: Path | None = None, rate: int = 16_000) -> Callable[..., AudioEncoder]:
    settings = AudioModel(name=name, source=str(source) if source else None, width=8)
    return lambda vocabulary: build_dual_encoder(Model(audio=settings, text=TextModel(**SMALL)), rate, vocabulary).audio


def text(name: str, source: Path | None = None) -> Callable[..., TextEncoder]:
    settings = TextModel(name=name, source=str(source) if source else None, **SMALL)
    return lambda vocabulary: (
        build_dual_encoder(Model(audio=AudioModel(width=8), text=settings), 16_000, vocabulary).text
    )


def automodel(folder: Path, kind: str) -> FolderTextEncoder:
    import transformers

    folder.mkdir()
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=size, max_position_embeddings=40, pad_token_id=1, **TEXT)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return FolderTextEncoder(folder, max_tokens=16)


def tower(kind: str, tmp_path: Path, vocabulary) -> Encoder:
    if kind not in ("conv", "transformer"):
        needs_pretrained()
    makers: dict[str, Callable[[], Encoder]] = {
        "conv": lambda: audio("conv")(vocabulary),
        "cnn14": lambda: audio("cnn14", save_cnn14(tmp_path / "cnn14.pth"), 32_000)(vocabulary),
        "yamnet": lambda: audio("yamnet")(vocabulary),
        "ast": lambda: audio("ast", save_ast(tmp_path / "ast"))(vocabulary),
        "whisper": lambda: audio("whisper", save_whisper(tmp_path / "whisper"))(vocabulary),
        "clap-htsat": lambda: audio("clap-htsat", save_clap(tmp_path / "clap"), 8000)(vocabulary),
        "transformer": lambda: text("transformer")(vocabulary),
        "minilm": lambda: text("minilm")(vocabulary),
        "clap-text": lambda: text("clap-text", save_clap(tmp_path / "clap"))(vocabulary),
        **{kind: lambda kind=kind: automodel(tmp_path / kind, kind) for kind in ("Bert", "Roberta", "MPNet")},
    }
    return makers[kind]()


@pytest.mark.parametrize(
    ("kind", "count", "inner"),
    [
        ("conv", 4, "convolution"),
        ("cnn14", 6, "conv1"),
        ("yamnet", 14, None),
        ("ast", 2, "attention"),
        ("whisper", 1, "self_attn"),
        ("clap-htsat", 3, "blocks"),
        ("transformer", 3, "self_attn"),
        ("minilm", 6, "attention"),
        ("clap-text", 2, "attention"),
        ("Bert", 2, "attention"),
        ("Roberta", 2, "attention"),
        ("MPNet", 2, "attention"),
    ],
)
def test_blocks_are_the_layers_in_the_order_that_they_are_computed(kind, count, inner, tmp_path, vocabulary):
    encoder = tower(kind, tmp_path, vocabulary).eval()
    blocks = encoder.tower_blocks()
    assert len(blocks) == count
    assert inner is None or all(inner in dict(block.named_children()) for block in blocks)
    reached: list[nn.Module] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, *_: reached.append(module))
    if isinstance(encoder, TextEncoder):
        encoder(encoder.tokenize(CAPTIONS))
    else:
        encoder(0.1 * torch.randn(2, encoder.sample_rate // 2))
    assert [id(block) for block in reached] == [id(block) for block in blocks]


@pytest.mark.parametrize(("kind", "name"), [("clap-htsat", "batch_norm"), ("MPNet", "relative_attention_bias")])
def test_what_a_network_registers_after_its_layers_but_uses_before_them_is_named(kind, name, tmp_path, vocabulary):
    encoder = tower(kind, tmp_path, vocabulary)
    assert name in encoder.before_blocks
    parts = [parameter.split(".") for parameter, _ in encoder.named_parameters()]
    late = [place for place, part in enumerate(parts) if name in part]
    assert late
    assert min(late) > max(place for place, part in enumerate(parts) if part[-2:] == ["query", "weight"] or "q" in part)
