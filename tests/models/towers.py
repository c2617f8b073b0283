"""Tiny random towers as the library transformers saves them, and a published CNN14's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from ask_dist.models.cnn14 import Cnn14Encoder

WORDS = [
    *("a", "and", "bark", "barks", "dog", "drum", "falls", "loud", "notes", "of"),
    *("on", "rain", "roof", "sound", "the", "then", "three", "tin", "viola"),
]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_tokenizer(folder: Path) -> int:
    """A word tokenizer that pads with 1, as RoBERTa's; returns its size."""
    from transformers import PreTrainedTokenizerFast

    units = {unit: place for place, unit in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(units, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    return len(units)


def save_clap(folder: Path, **audio: Any) -> Path:
    """A whole ClapModel of two seconds at 8 kHz, with its tokenizer and feature extractor."""
    from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

    folder.mkdir(parents=True)
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    text = ClapTextConfig(
        vocab_size=size, max_position_embeddings=40, pad_token_id=1, initializer_factor=5.0, **NO_DROPOUT, **TEXT
    )
    heard = ClapAudioConfig(
        spec_size=64,
        num_mel_bins=16,
        patch_embeds_hidden_size=8,
        hidden_size=32,
        depths=[1, 1, 1],
        num_attention_heads=[2, 2, 2],
        window_size=4,
        num_hidden_layers=3,
        **NO_DROPOUT,
        initializer_factor=5.0,  # larger than usual, or all clips would look alike
        **audio,
    )
    config = ClapConfig(text_config=text.to_dict(), audio_config=heard.to_dict(), projection_dim=12)
    network = ClapModel(config)
    with torch.no_grad():  # of real decibels, which the random layers would not tell apart
        network.audio_model.audio_encoder.batch_norm.running_mean.fill_(-30.0)
        network.audio_model.audio_encoder.batch_norm.running_var.fill_(400.0)
    network.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8000,
        hop_length=160,
        fft_window_size=512,
        max_length_s=2,
        frequency_min=50,
        frequency_max=3800,
        truncation="fusion" if audio.get("enable_fusion") else "rand_trunc",
    ).save_pretrained(folder)
    return folder


def save_ast(folder: Path) -> Path:
    """An ASTModel that hears a second."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    torch.manual_seed(0)
    size = {"num_mel_bins": 32, "max_length": 100, "patch_size": 16, "frequency_stride": 10, "time_stride": 10}
    ASTModel(ASTConfig(**TEXT, **size)).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=32, max_length=100).save_pretrained(folder)
    return folder


def save_whisper(folder: Path) -> Path:
    """A WhisperModel that hears two seconds."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    layers = {f"{side}_{what}": count for side in ("encoder", "decoder") for what, count in LAYERS.items()}
    config = WhisperConfig(
        vocab_size=32,
        num_mel_bins=16,
        d_model=16,
        max_source_positions=100,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        **layers,
    )
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(folder)
    return folder


def save_roberta(folder: Path) -> Path:
    """A RobertaModel of two layers with its tokenizer."""
    from transformers import RobertaConfig, RobertaModel

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=save_tokenizer(folder), max_position_embeddings=40, pad_token_id=1, **TEXT)
    RobertaModel(config).save_pretrained(folder)
    return folder


def save_cnn14(path: Path) -> Path:
    """A checkpoint as PANNs publishes them: the front end's constants and the classifier stand beside the network."""
    torch.manual_seed(0)
    network = Cnn14Encoder()
    for layer in network.modules():  # wide enough for a signal to pass all layers, or all clips would sound alike
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    network.bn0.running_mean.fill_(-30.0)  # of real decibels
    network.bn0.running_var.fill_(400.0)
    weights = network.state_dict()
    extra = {
        "spectrogram_extractor.stft.conv_real.weight": torch.zeros(513, 1, 1024),
        "logmel_extractor.melW": torch.zeros(513, 64),
        "fc_audioset.weight": torch.zeros(527, 2048),
        "fc_audioset.bias": torch.zeros(527),
    }
    torch.save({"iteration": 600_000, "model": weights | extra}, path)
    return path


LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
