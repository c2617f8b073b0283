"""A `ClapModel` of transformers, for models whose towers and projections are its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.files import write_atomically
from ask_dist.models.clap import ClapAudioEncoder, ClapTextEncoder
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.pretrained import SAVED, optional_module, quiet


def write_clap(folder: Path, model: DualEncoder, config: Config) -> None:
    """Fills a folder for `ClapModel.from_pretrained` and `ClapProcessor.from_pretrained`.

    Raises:
        InputError: transformers has no class for this model.
    """
    audio, text = model.audio, model.text
    if not (
        isinstance(audio, ClapAudioEncoder) and isinstance(text, ClapTextEncoder) and config.model.projection == "none"
    ):
        raise InputError(
            f"transformers has no class for {config.model.audio.name} with {config.model.text.name} and "
            f"model.projection={config.model.projection}, only for clap-htsat with clap-text and none; "
            "use --format safetensors"
        )
    transformers = optional_module("transformers", "clap-htsat")
    towers = [network.config.to_dict() for network in (text.network, audio.network)]
    for tower in towers:
        tower.pop("_name_or_path", None)  # a folder of this machine
    described = transformers.ClapConfig(
        text_config=towers[0],
        audio_config=towers[1],
        projection_dim=audio.output_dim,
        projection_hidden_act=audio.network.config.projection_hidden_act,
    )
    network = transformers.ClapModel(described)
    network.load_state_dict(_weights(audio, text, model.logit_scale))
    with quiet(transformers):
        network.save_pretrained(folder)
    for name, content in (audio.assets() | text.assets()).items():
        if Path(name).name not in ("config.json", SAVED):
            write_atomically(folder / Path(name).name, content)


def _weights(audio: ClapAudioEncoder, text: ClapTextEncoder, logit_scale: Tensor) -> dict[str, Tensor]:
    scale = torch.log(logit_scale.detach())
    scales = {"logit_scale_a": scale, "logit_scale_t": scale}
    return scales | audio.network.state_dict() | text.network.state_dict()
