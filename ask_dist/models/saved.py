"""A trained model on disk: safetensors, the files that describe its encoders, and the run's configuration."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from ask_dist import config as configuration
from ask_dist.config import Config, Model
from ask_dist.errors import InputError
from ask_dist.files import write_atomically
from ask_dist.models.dual_encoder import DualEncoder, build_dual_encoder
from ask_dist.models.pretrained import is_saved
from ask_dist.models.text import Vocabulary

WEIGHTS = "model.safetensors"


def save_model(folder: Path, model: DualEncoder) -> None:
    """Writes a model's weights and the files of its encoders for `load_model`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    aside = folder / f".{WEIGHTS}"
    save_file(weights, aside)
    os.replace(aside, folder / WEIGHTS)
    for name, content in (model.audio.assets() | model.text.assets()).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)


def load_model(run_dir: Path) -> tuple[Config, DualEncoder]:
    """The configuration and the trained model of a finished run, in evaluation mode on the CPU.

    Folders and files that pretrained encoders came from are not needed again.

    Raises:
        InputError: the folder is no finished run, or its weights do not fit its configuration.
    """
    config = load_config(run_dir)
    folder = run_dir / "model"
    vocabulary = Vocabulary.load(folder / Vocabulary.FILE)
    model = build_dual_encoder(described(config.model, run_dir), config.data.sample_rate, vocabulary)
    load_weights(model, run_dir)
    return config, model.eval()


def load_config(run_dir: Path) -> Config:
    """The configuration of a finished run.

    Raises:
        InputError: the folder is no finished run.
    """
    if not (run_dir / "model" / WEIGHTS).is_file():
        raise InputError(f"{run_dir} holds no finished run (no model/{WEIGHTS}); train it, or finish it with --resume")
    return configuration.load(run_dir / "config.yaml")


def load_weights(model: DualEncoder, run_dir: Path) -> None:
    """Puts the weights of a finished run into a model of its architecture.

    Raises:
        InputError: they do not fit.
    """
    try:
        weights = load_file(run_dir / "model" / WEIGHTS)
        # A run may start from one that was trained by the other loss.
        if model.logit_bias is None:
            weights.pop("logit_bias", None)
        else:
            weights.setdefault("logit_bias", model.logit_bias)
        model.load_state_dict(weights)
    except Exception as error:  # safetensors and torch each raise types of their own
        raise InputError(f"{run_dir}/model/{WEIGHTS} does not fit config.yaml: {str(error).splitlines()[0]}") from None


def digest(run_dir: Path) -> str:
    """SHA-256 of what a run embeds by: its weights, its tokenizer, and what describes its encoders."""
    folder, whole = run_dir / "model", hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            whole.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def described(config: Model, run_dir: Path) -> Model:
    """The same model with a finished run's own descriptions of its encoders as their sources."""
    folder = run_dir / "model"
    towers = {
        name: getattr(config, name).model_copy(update={"source": str(folder / name)})
        for name in ("audio", "text")
        if is_saved(folder / name)
    }
    return config.model_copy(update=towers)
