"""A trained model on disk: safetensors, the text encoder's files, and the run's configuration."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.files import write_atomically
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.text import Vocabulary

WEIGHTS = "model.safetensors"


def save_model(folder: Path, model: DualEncoder) -> None:
    """Writes a model's weights and its text encoder's files for `load_model`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    aside = folder / f".{WEIGHTS}"
    save_file(weights, aside)
    os.replace(aside, folder / WEIGHTS)
    for name, content in model.text.assets().items():
        write_atomically(folder / name, content)


def load_model(run_dir: Path) -> tuple[Config, DualEncoder]:
    """The configuration and the trained model of a finished run, in evaluation mode on the CPU.

    Raises:
        InputError: the folder is no finished run, or its weights do not fit its configuration.
    """
    if not (run_dir / "model" / WEIGHTS).is_file():
        raise InputError(f"{run_dir} holds no finished run (no model/{WEIGHTS}); train it, or finish it with --resume")
    config = configuration.load(run_dir / "config.yaml")
    vocabulary = Vocabulary.load(run_dir / "model" / Vocabulary.FILE)
    model = build_dual_encoder(config.model, config.data.sample_rate, vocabulary)
    try:
        model.load_state_dict(load_file(run_dir / "model" / WEIGHTS))
    except Exception as error:  # safetensors and torch each raise types of their own
        raise InputError(f"{run_dir}/model/{WEIGHTS} does not fit config.yaml: {str(error).splitlines()[0]}") from None
    return config, model.eval()
