"""Low-rank adapters (Hu et al. 2021, "LoRA"): peft puts them into a tower whose own weights then stay as they are."""

from __future__ import annotations

import copy

from torch import nn

from ask_dist.config import Lora, Model
from ask_dist.errors import InputError
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.encoder import Encoder
from ask_dist.models.pretrained import first_line, optional_module


def add_adapters(model: DualEncoder, config: Model) -> None:
    """Gives the towers the adapters that the configuration asks for; at first they change nothing of what a tower says.

    To be called once the weights are those that the run starts from: their names change.

    Raises:
        InputError: peft is not installed, the tower has no layer of the names in `targets`, or one is of an
            `nn.MultiheadAttention`.
    """
    for side, encoder, lora in (
        ("audio", model.audio, config.audio.lora),
        ("text", model.text, config.text.lora),
    ):
        if lora is not None:
            _add(encoder, lora, f"model.{side}.lora")


def adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def merged(model: nn.Module) -> nn.Module:
    """A copy whose weights have the adapters added to them, under the names from before; the model itself without."""
    if not adapted(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            plain.set_submodule(name, layer.get_base_layer())
    return plain


def _add(encoder: Encoder, lora: Lora, setting: str) -> None:
    peft = optional_module("peft", setting)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    # What torch's attention computes by: it reads the weights of its last layer past an adapter, and one around the
    # whole can't be taken off again.
    attention = {name for name, module in encoder.named_modules() if isinstance(module, nn.MultiheadAttention)}
    attention |= {f"{name}.out_proj" for name in attention}
    # A layer that an encoder holds frozen by itself is one that it does not use, such as a pooler.
    unused = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear) and _frozen(module)}
    adapters = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=sorted(attention | unused) if targets == "all-linear" else None,
        bias="none",
    )
    try:
        peft.inject_adapter_in_model(adapters, encoder)  # freezes all other weights too
    except ValueError as error:  # no such layer, or one of a kind that takes no adapter
        raise InputError(f"{setting}.targets={targets}: {first_line(error)}; name other layers") from None
    for name, module in encoder.named_modules():
        if name in attention and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            raise InputError(
                f"{setting}.targets={targets}: an adapter in nn.MultiheadAttention ({name}) would not learn or not be "
                "merged; name other layers, such as linear1 and linear2, or all-linear"
            )


def _frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())
