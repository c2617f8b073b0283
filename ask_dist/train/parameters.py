"""What an optimizer does with which parameters: groups by rate, weight decay and tower. Torch alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.encoder import Encoder


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """The trained parameters as groups for AdamW: matrices with weight decay; norms, biases (those of relative
    positions too), logit_scale and logit_bias without.

    Args:
        model: its encoders are looked for among its modules.
        weight_decay: of matrices.
        layer_decay: the last block of an encoder, and what comes after it, has the full rate; each block below has
            that of the one above times this, and what comes before the first block that of the first times this
            (Clark et al. 2020, "ELECTRA", appendix A).

    Returns:
        Groups with `params`, `weight_decay`, `scale` (the schedule's rate is to be multiplied by it), and `tower`: the
        name of an encoder that is frozen until a step and holds them; None for all others.
    """
    scales: dict[nn.Parameter, float] = {}
    towers: dict[nn.Parameter, str] = {}
    for name, encoder in encoders(model).items():
        scales |= _layer_scales(encoder, layer_decay)
        if encoder.thaws_at > 0.0:
            towers |= dict.fromkeys(encoder.parameters(), name)
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = defaultdict(list)
    # Tables of biases by relative position, which are matrices, too.
    biases = {parameter for name, parameter in model.named_parameters() if "bias" in name}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 and parameter not in biases else 0.0
            groups[scales.get(parameter, 1.0), decay, towers.get(parameter, "")].append(parameter)
    return [
        {"params": groups[key], "scale": key[0], "weight_decay": key[1], "tower": key[2] or None}
        for key in sorted(groups, reverse=True)
    ]


def encoders(model: nn.Module) -> dict[str, Encoder]:
    """The encoders inside a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Encoder)}


def largest(model: nn.Module) -> dict[nn.Parameter, float]:
    """What parameters of a model must not exceed after an update."""
    return {
        parameter: most
        for module in model.modules()
        if isinstance(module, DualEncoder)
        for parameter, most in module.largest().items()
    }


def _layer_scales(encoder: Encoder, layer_decay: float) -> dict[nn.Parameter, float]:
    """What the rate of each parameter of an encoder is to be multiplied by."""
    blocks = encoder.tower_blocks()
    depths = {parameter: depth for depth, block in enumerate(blocks, 1) for parameter in block.parameters()}
    scales, before = {}, True
    for name, parameter in encoder.named_parameters():
        # Parameters come in the order of their registration, which is that of depth but for those that are named.
        before = before and parameter not in depths
        named = not set(encoder.before_blocks).isdisjoint(name.split("."))
        depth = depths.get(parameter, 0 if before or named else len(blocks))
        scales[parameter] = layer_decay ** (len(blocks) - depth)
    return scales
