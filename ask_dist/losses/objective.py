"""The ASK objective, usable in any training loop: contrast, fine and coarse knowledge, reliability, behind a gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ask_dist.config import BatchLoss, Knowledge
from ask_dist.losses.contrastive import info_nce, weighted_mean
from ask_dist.losses.gather import GlobalBatch, gather
from ask_dist.losses.injection import Neighbours, bank_contrast, consistency, similarities
from ask_dist.losses.reliability import (
    UNKNOWN,
    pair_reliability,
    reliability_weights,
    running_reliability,
    wrong_share,
)
from ask_dist.losses.siglip import siglip


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

    Without neighbours, before its gates or with knowledge.enabled false, it is the plain symmetric InfoNCE, or the
    sigmoid loss, over the global batch.

    Args:
        knowledge: weights, temperatures and gates.
        half_life: a bank row that is older by so many global steps than the pair's own counts half as a negative.
        loss: what contrasts the pairs of the batch.
    """

    def __init__(self, knowledge: Knowledge, half_life: float = float("inf"), loss: BatchLoss = "info_nce") -> None:
        self.knowledge = knowledge
        self.half_life = half_life
        self.loss = loss

    def __call__(
        self,
        audio_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | float,
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
            logit_bias: scalar, of the sigmoid loss alone; InfoNCE has none.
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
        contrast = self._batch_contrast(audio_features, text_features, logit_scale, logit_bias, batch)
        further = {}
        if use and neighbours is not None:
            products = similarities(audio_features, text_features, [neighbours.text, neighbours.paired.audio])
            contrast = self._with_bank(contrast, audio_features, text_features, logit_scale, neighbours, products)
            further = self._agreement(audio_features, text_features, batch, weights, neighbours, products)
        terms = {"contrast": weighted_mean(contrast, weights, batch), **further}
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

    def _batch_contrast(
        self, audio: Tensor, text: Tensor, scale: Tensor, bias: Tensor | float, batch: GlobalBatch
    ) -> Tensor:
        """float [local]: the sigmoid loss of each audio row, or the mean of InfoNCE's two directions."""
        if self.loss == "siglip":
            return siglip(audio, batch.text_features, scale, bias, batch)
        by_audio = info_nce(audio, batch.text_features, scale, batch)
        return (by_audio + info_nce(text, batch.audio_features, scale, batch)) / 2

    def _with_bank(
        self,
        contrast: Tensor,
        audio: Tensor,
        text: Tensor,
        scale: Tensor,
        known: Neighbours,
        products: list[Tensor],
    ) -> Tensor:
        """float [local]: by contrast_weight the mean of both directions against the bank, where it holds the pair."""
        share, (with_texts, with_audio) = self.knowledge.contrast_weight, products
        if share == 0:
            return contrast
        local = len(audio)
        wide = bank_contrast(audio, known.own_text, with_texts[:local], known, scale, self.half_life)
        wide = wide + bank_contrast(text, known.own_audio, with_audio[local:], known.paired, scale, self.half_life)
        return torch.where(known.own_age >= 0, (1 - share) * contrast + share * wide / 2, contrast)

    def _agreement(
        self,
        audio: Tensor,
        text: Tensor,
        batch: GlobalBatch,
        weights: Tensor,
        neighbours: Neighbours,
        products: list[Tensor],
    ) -> dict[str, Tensor]:
        settings = self.knowledge
        terms = {}
        if settings.consistency_weight > 0:
            fine = consistency(products, settings.temperature)
            terms["consistency"] = settings.consistency_weight * weighted_mean(fine, weights, batch)
        if settings.coarse_weight > 0 and neighbours.prototypes:
            sets = similarities(audio, text, [rows for level in neighbours.prototypes for rows in level])
            coarse = consistency(sets, settings.temperature)
            terms["coarse"] = settings.coarse_weight * weighted_mean(coarse, weights, batch)
        return terms
