"""How far a pair can be trusted: do its audio's neighbours and its text's neighbours agree?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNKNOWN = -1.0


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each row (Lin 1991, equation 3.8), in nats, between 0 and ln 2.

    Args:
        log_p, log_q: float [rows, outcomes], log-probabilities.

    Returns:
        float [rows].
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    p_term = (log_p.exp() * (log_p - log_m)).sum(dim=1)
    q_term = (log_q.exp() * (log_q - log_m)).sum(dim=1)
    return 0.5 * (p_term + q_term)


def per_query_log_probabilities(similarities: Tensor, rank: int, shape: float) -> Tensor:
    """log softmax with a temperature of each query's own: (best - rank-th best similarity) / shape.

    A fixed temperature makes every pair look reliable once the embeddings spread; this one keeps the distribution's
    shape (our reading of ASK's adaptive reliability).

    Args:
        similarities: float [queries, rows], rows >= rank.
        rank: which of the best similarities sets the scale.
        shape: how many temperatures lie between the best and that one.
    """
    best = similarities.topk(rank, dim=1).values
    temperature = ((best[:, 0] - best[:, -1]) / shape).clamp(min=1e-4)
    return (similarities / temperature.unsqueeze(1)).log_softmax(dim=1)


@torch.no_grad()
def pair_reliability(
    audio_features: Tensor, text_features: Tensor, bank_audio: Tensor, bank_text: Tensor, *, rank: int, shape: float
) -> Tensor:
    """r = 1 - JSD(p, q) / ln 2 with p the distribution of the audio over the bank's audio, q of the text over its text.

    Args:
        audio_features, text_features: float [batch, dim], unit rows.
        bank_audio, bank_text: float [rows, dim], unit rows, paired; without the batch's own rows.
        rank, shape: see `per_query_log_probabilities`.

    Returns:
        float32 [batch] in [0, 1]; UNKNOWN where the bank has fewer than `rank` rows and so tells nothing.
    """
    if len(bank_audio) < rank:
        return torch.full((len(audio_features),), UNKNOWN, device=audio_features.device)
    p = per_query_log_probabilities(audio_features @ bank_audio.T, rank, shape)
    q = per_query_log_probabilities(text_features @ bank_text.T, rank, shape)
    return (1.0 - jensen_shannon(p, q) / math.log(2.0)).clamp(0.0, 1.0)


@torch.no_grad()
def reliability_weights(reliability: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """w = (r / mean r)^gamma, scaled to mean 1 over the valid pairs of known reliability; the unknown ones get 1.

    Args:
        reliability: float [global], UNKNOWN (-1) where nothing is known, as on a rank whose answer came late.
        valid: bool [global].
        gamma: how sharply reliable pairs are preferred; 0 gives ones.

    Returns:
        float [global].
    """
    known = valid & (reliability >= 0)
    count = known.sum().clamp(min=1)
    r = reliability.clamp(min=0.0)
    mean = torch.where(known, r, torch.zeros_like(r)).sum() / count
    weights = (r / mean.clamp(min=1e-6)).pow(gamma)
    total = torch.where(known, weights, torch.zeros_like(weights)).sum()
    return torch.where(known, weights * count / total.clamp(min=1e-6), torch.ones_like(weights))
