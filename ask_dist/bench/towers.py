"""Audio encoders of their published sizes with random weights: figures of speed need no learned ones."""

from __future__ import annotations

from pathlib import Path

import torch

from ask_dist.models.cnn14 import Cnn14Encoder


def save_clap_htsat(folder: Path) -> Path:
    """The audio tower of LAION's `clap-htsat-unfused`, in a whole ClapModel whose text tower is a small one."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    text = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    ClapModel(ClapConfig(text_config=text, audio_config={})).save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    return folder


def save_ast(folder: Path) -> Path:
    """MIT's audio spectrogram transformer, for five seconds of the ten that it hears."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    ASTModel(ASTConfig(max_length=512)).save_pretrained(folder)
    ASTFeatureExtractor(max_length=512).save_pretrained(folder)
    return folder


def save_whisper(folder: Path) -> Path:
    """OpenAI's `whisper-tiny`."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    WhisperModel(WhisperConfig()).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def save_cnn14(folder: Path) -> Path:
    """CNN14 of the PANNs; returns the file."""
    folder.mkdir(parents=True)
    torch.save({"model": Cnn14Encoder().state_dict()}, folder / "cnn14.pth")
    return folder / "cnn14.pth"
