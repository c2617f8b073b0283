"""Blocks that are computed again: the same gradients, out of fewer bytes kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ask_dist.config import AudioModel, Model, TextModel
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.text import Vocabulary
from ask_dist.train.recompute import recompute_blocks


def gradients(model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Of one step with dropout, and how many bytes were kept for it."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    audio = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
    tokens = model.text.tokenize(["a dog", "rain", "a dog in rain", "dog"])
    torch.manual_seed(1)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        features = model(audio, tokens)
        loss = (features.audio_features * features.text_features)[:, :3].sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}, kept


def test_gradients_with_dropout_are_equal_and_fewer_bytes_are_kept():
    settings = Model(
        embedding_dim=12,
        dropout=0.3,
        audio=AudioModel(width=8, mel_bins=20),
        text=TextModel(width=16, layers=3, heads=2, max_tokens=8),
    )
    torch.manual_seed(0)
    plain = build_dual_encoder(settings, 8000, Vocabulary.train(["a dog", "rain"], 300)).train()
    other = copy.deepcopy(plain)
    recompute_blocks(other)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in plain.named_parameters()]
    wanted, all_kept = gradients(plain)
    found, kept = gradients(other)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)
    assert kept < 0.7 * all_kept


def test_a_copy_computes_with_its_own_weights():
    settings = Model(embedding_dim=12, audio=AudioModel(width=8, mel_bins=20), text=TextModel(width=16, heads=2))
    torch.manual_seed(0)
    model = build_dual_encoder(settings, 8000, Vocabulary.train(["a dog", "rain"], 300)).eval()
    recompute_blocks(model)
    copied = copy.deepcopy(model)
    tokens = model.text.tokenize(["a dog", "rain"])
    before = copied.encode_text(tokens)
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied.encode_text(tokens), before, atol=0, rtol=0)
