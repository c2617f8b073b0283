"""The ASK objective, usable in any training loop: contrast, fine and coarse knowledge, reliability, behind a gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ask_dist.config import Knowledge
from ask_dist.losses.contrastive import contrast_masks, info_nce, weighted_mean
from ask_dist.losses.gather import GlobalBatch, gather
from ask_dist.losses.injection import Neighbours, consistency, extra_logits
from ask_dist.losses.reliability import UNKNOWN, pair_reliability, reliability_weights


@dataclass(frozen=True)
class ObjectiveOutput:
    """What a step's objective gives.

    Attributes:
        loss: scalar with gradient; average gradients over ranks (as DDP and DeepSpeed do).
        terms: detached scalars by name: contrast, consistency, coarse.
        reliability: float32 [local], r of each local pair in [0, 1]; -1 where the bank said nothing.
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
        half_life: global steps after which a bank row counts half as a negative.
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
    ) -> ObjectiveOutput:
        """The loss of one step.

        Args:
            audio_features, text_features: float32 [local, dim], unit rows, paired.
            logit_scale: scalar, exponentiated.
            ids: int64 [local]; equal ids are never each other's negatives.
            valid: bool [local], False for slots to ignore; None: all count.
            neighbours: what the bank answered for this batch, or None.
            progress: share of the run that lies behind, for the gates.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        reliability = self._reliability(audio_features, text_features, neighbours)
        batch = gather(audio_features, text_features, reliability, ids, valid)
        weights = self._weights(batch, len(ids), progress)
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

    def _reliability(self, audio: Tensor, text: Tensor, neighbours: Neighbours | None) -> Tensor:
        settings = self.knowledge.reliability
        if neighbours is None or len(neighbours) == 0:
            return torch.full((len(audio),), UNKNOWN, device=audio.device)
        return pair_reliability(
            audio, text, neighbours.audio, neighbours.text, rank=settings.rank, shape=settings.shape
        )

    def _weights(self, batch: GlobalBatch, local: int, progress: float) -> Tensor:
        settings = self.knowledge.reliability
        if not (self.knowledge.enabled and settings.enabled) or progress < settings.start:
            return torch.ones(local, device=batch.reliability.device)
        weights = reliability_weights(batch.reliability, batch.valid, settings.gamma)
        return weights[batch.offset : batch.offset + local]

    def _contrast(
        self,
        audio: Tensor,
        text: Tensor,
        scale: Tensor,
        batch: GlobalBatch,
        weights: Tensor,
        neighbours: Neighbours | None,
    ) -> dict[str, Tensor]:
        """Half the sum of both directions, in the batch; mixed in by contrast_weight, against the bank's rows too."""
        allowed, target = contrast_masks(batch, len(audio))
        by_audio = scale * audio @ batch.text_features.T
        by_text = scale * text @ batch.audio_features.T
        plain = info_nce(by_audio, allowed, target) + info_nce(by_text, allowed, target)
        if neighbours is None or self.knowledge.contrast_weight == 0:
            return {"contrast": weighted_mean(plain / 2, weights, batch)}
        extra_text = extra_logits(audio, neighbours.text, neighbours, batch, scale, self.half_life)
        extra_audio = extra_logits(text, neighbours.audio, neighbours, batch, scale, self.half_life)
        wide = info_nce(by_audio, allowed, target, extra_text) + info_nce(by_text, allowed, target, extra_audio)
        share = min(self.knowledge.contrast_weight, 1.0)
        return {"contrast": weighted_mean(((1 - share) * plain + share * wide) / 2, weights, batch)}

    def _agreement(
        self, audio: Tensor, text: Tensor, batch: GlobalBatch, weights: Tensor, neighbours: Neighbours
    ) -> dict[str, Tensor]:
        settings = self.knowledge
        terms = {}
        if settings.consistency_weight > 0:
            fine = consistency(audio, text, neighbours.audio, neighbours.text, settings.temperature)
            terms["consistency"] = settings.consistency_weight * weighted_mean(fine, weights, batch)
        if settings.coarse_weight > 0 and neighbours.prototypes:
            levels = [consistency(audio, text, a, t, settings.temperature) for a, t in neighbours.prototypes]
            coarse = torch.stack(levels).mean(dim=0)
            terms["coarse"] = settings.coarse_weight * weighted_mean(coarse, weights, batch)
        return terms
