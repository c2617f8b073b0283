"""The ASK objective, usable in any training loop: contrast, fine and coarse knowledge, reliability, behind a gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ask_dist.config import Knowledge
from ask_dist.losses.contrastive import contrast_masks, info_nce, weighted_mean
from ask_dist.losses.gather import GlobalBatch, gather
from ask_dist.losses.injection import Neighbours, bank_contrast, consistency
from ask_dist.losses.reliability import (
    UNKNOWN,
    pair_reliability,
    reliability_weights,
    running_reliability,
    wrong_share,
)


@dataclass(frozen=True)
class ObjectiveOutput:
    """What a step's objective gives.

    Attributes:
        loss: scalar with gradient; average gradients over ranks (as DDP and DeepSpeed do).
        terms: detached scalars by name: contrast, consistency, coarse.
        reliability: float32 [local], running mean of r of each local pair in [0, 1]; -1 where nothing is known.
        knowledge_used: whether the knowledge terms took part.
        batch: the global batch that the loss was taken over.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    reliability: Tensor
    knowledge_used: bool
    batch: GlobalBatch


class AskObjective:
    """Adaptive Self-improving Knowledge as a loss (our reading of arXiv 2512.19703, see docs/method.md).

    Without neighbours, before its gates or with knowledge.enabled false, it is the plain symmetric InfoNCE over the
    global batch.

    Args:
        knowledge: weights, temperatures and gates.
        half_life: a bank row that is older by so many global steps than the pair's own counts half as a negative.
    """

    def __init__(self, knowledge: Knowledge, half_life: float = float("inf")) -> None:
        self.knowledge = knowledge
        self.half_life = half_life

    def __call__(
        self,
        audio_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        ids: Tensor,
        valid: Tensor | None = None,
        neighbours: Neighbours | None = None,
        progress: float = 1.0,
        mixed: Tensor | None = None,
    ) -> ObjectiveOutput:
        """The loss of one step.

        Args:
            audio_features, text_features: float32 [local, dim], unit rows, paired.
            logit_scale: scalar, exponentiated.
            ids: int64 [local]; equal ids are never each other's negatives.
            valid: bool [local], False for slots to ignore; None: all count.
            neighbours: what the bank answered for this batch, or None.
            progress: share of the run that lies behind, for the gates.
            mixed: bool [local], rows that are no pair of the corpus: of unknown reliability, and none of the bank is
                their own; None: no row is.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        mixed = torch.zeros_like(valid) if mixed is None else mixed
        if neighbours is not None:
            neighbours = neighbours.without_own(mixed)
        batch = gather(audio_features, text_features, ids, valid)
        reliability = self._reliability(batch, len(ids), neighbours).masked_fill(mixed, UNKNOWN)
        weights = self._weights(reliability, neighbours, progress)
        # Gates depend on progress alone, so that all ranks pass them together; an answer may be missing on one rank.
        use = (
            self.knowledge.enabled
            and progress >= self.knowledge.start
            and neighbours is not None
            and len(neighbours) > 0
        )
        terms = self._contrast(audio_features, text_features, logit_scale, batch, weights, neighbours if use else None)
        if use and neighbours is not None:
            terms |= self._agreement(audio_features, text_features, batch, weights, neighbours)
        loss = torch.stack(list(terms.values())).sum()
        detached = {name: term.detach() for name, term in terms.items()}
        return ObjectiveOutput(loss, detached, reliability, use, batch)

    def _reliability(self, batch: GlobalBatch, local: int, neighbours: Neighbours | None) -> Tensor:
        settings = self.knowledge.reliability
        if neighbours is None:
            return torch.full((local,), UNKNOWN, device=batch.ids.device)
        now = pair_reliability(batch, local, neighbours.paired, rank=settings.rank, shape=settings.shape)
        return running_reliability(now, neighbours.own_reliability, settings.momentum)

    def _weights(self, reliability: Tensor, neighbours: Neighbours | None, progress: float) -> Tensor:
        settings = self.knowledge.reliability
        closed = not (self.knowledge.enabled and settings.enabled) or progress < settings.start
        if closed or neighbours is None:
            return torch.ones_like(reliability)
        share = wrong_share(neighbours.reliability)
        return reliability_weights(reliability, settings.gamma * share * (1.0 - share))

    def _contrast(
        self,
        audio: Tensor,
        text: Tensor,
        scale: Tensor,
        batch: GlobalBatch,
        weights: Tensor,
        neighbours: Neighbours | None,
    ) -> dict[str, Tensor]:
        """Half the sum of both directions: in the batch, and by contrast_weight against the bank."""
        allowed, target = contrast_masks(batch, len(audio))
        by_audio = scale * audio @ batch.text_features.T
        by_text = scale * text @ batch.audio_features.T
        contrast = info_nce(by_audio, allowed, target) + info_nce(by_text, allowed, target)
        share = self.knowledge.contrast_weight
        if neighbours is not None and share > 0:
            known, heard = neighbours, neighbours.paired
            wide = bank_contrast(audio, known.own_text, known.text, known, scale, self.half_life)
            wide = wide + bank_contrast(text, known.own_audio, heard.audio, heard, scale, self.half_life)
            contrast = torch.where(known.own_age >= 0, (1 - share) * contrast + share * wide, contrast)
        return {"contrast": weighted_mean(contrast / 2, weights, batch)}

    def _agreement(
        self, audio: Tensor, text: Tensor, batch: GlobalBatch, weights: Tensor, neighbours: Neighbours
    ) -> dict[str, Tensor]:
        settings = self.knowledge
        terms = {}
        if settings.consistency_weight > 0:
            fine = consistency(audio, text, neighbours.paired.audio, neighbours.text, settings.temperature)
            terms["consistency"] = settings.consistency_weight * weighted_mean(fine, weights, batch)
        if settings.coarse_weight > 0 and neighbours.prototypes:
            levels = [consistency(audio, text, a, t, settings.temperature) for a, t in neighbours.prototypes]
            coarse = torch.stack(levels).mean(dim=0)
            terms["coarse"] = settings.coarse_weight * weighted_mean(coarse, weights, batch)
        return terms
