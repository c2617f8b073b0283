"""Mixing: two clips of a batch at once, their captions joined."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ask_dist.data.lanes import Tokenize
from ask_dist.data.loader import Batch
from ask_dist.data.shards import stable_id

SPREAD = 10.0  # dB: neither sound is louder than the other by more
CONJUNCTION = "and"


def mix(batch: Batch, share: float, device: torch.device, tokenize: Tokenize) -> tuple[Batch, Tensor]:
    """A batch in which some rows are two of its clips at once, drawn from torch's default generator.

    Valid rows are drawn in pairs. Both rows of a pair become mixtures of their two clips, each with a level of its own
    and with the captions in its own order, under one new id: so they are no negatives of each other, and neither clip
    is left alone in the batch to be one of its own mixtures'. A mixture is as long as the longer of its clips.

    Args:
        batch: of the loader, with sounds.
        share: of the valid rows, rounded to whole pairs; 0 draws nothing and gives the batch as it is.
        device: where the sounds are mixed.
        tokenize: makes tokens of the joined captions; it is not called where nothing is mixed.

    Returns:
        The batch, and bool [B] on `device`: the mixed rows. They are no pair of the corpus; ids of the others stay.
    """
    mixed = torch.zeros(len(batch.ids), dtype=torch.bool)
    rows = batch.valid.nonzero().squeeze(1)
    pairs = round(share * len(rows) / 2)
    if pairs == 0:
        return batch, mixed.to(device)
    first, second = rows[torch.randperm(len(rows))[: 2 * pairs]].chunk(2)
    targets, others = torch.cat([first, second]), torch.cat([second, first])
    levels = SPREAD * (2.0 * torch.rand(len(targets)) - 1.0)
    audio, ids, captions = batch.audio.to(device, copy=True), batch.ids.clone(), list(batch.captions)
    audio[targets] = _sum(audio[targets], audio[others], levels.to(device))
    for target, other in zip(targets.tolist(), others.tolist(), strict=True):
        low, high = sorted((int(batch.ids[target]), int(batch.ids[other])))
        ids[target] = stable_id(f"{low}+{high}")
        captions[target] = f"{batch.captions[target].rstrip(' .')} {CONJUNCTION} {batch.captions[other]}"
    mixed[targets] = True
    lengths = batch.lengths
    if lengths is not None:
        lengths = lengths.index_put((targets,), torch.maximum(lengths[targets], lengths[others]))
    tokens = tokenize(captions)
    return replace(batch, audio=audio, ids=ids, captions=captions, tokens=tokens, lengths=lengths), mixed.to(device)


def _sum(signal: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """signal + noise, float [n, samples] each, the first by `level` dB (float [n]) the louder, in [-1, 1]."""
    power, other = (sound.square().mean(dim=1) for sound in (signal, noise))
    gain = (power / (other.clamp(min=1e-12) * 10.0 ** (level / 10.0))).sqrt()
    both = signal + gain.unsqueeze(1) * noise
    return both / both.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
