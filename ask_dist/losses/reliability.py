"""How far a pair can be trusted: do its two halves agree about the bank better than wrong pairs do?"""

from __future__ import annotations

import torch
from torch import Tensor

from ask_dist.losses.contrastive import column_blocks, contrast_masks
from ask_dist.losses.gather import GlobalBatch
from ask_dist.losses.injection import Neighbours

UNKNOWN = -1.0


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
def pair_reliability(batch: GlobalBatch, local: int, neighbours: Neighbours, *, rank: int, shape: float) -> Tensor:
    """r: the share of the batch's wrong pairs, made of one half of this pair and one half of another, that agree less.

    The halves agree by the Bhattacharyya coefficient sum_j sqrt(p_j q_j) of p, the distribution of the audio over the
    bank's audio, and q, that of the text over the bank's text (Bhattacharyya 1943): one matrix product for all pairs
    of this rank's rows and another's. Measured against wrong pairs of the same moment, r means the same early and late
    in training: near 1 for right pairs, uniform from 0 to 1 for wrong ones.

    Args:
        batch: the global batch.
        local: number of rows of this rank.
        neighbours: what the bank answered this rank.
        rank, shape: see `per_query_log_probabilities`.

    Returns:
        float32 [local] in [0, 1]; UNKNOWN where the bank has fewer than `rank` rows or the batch no other pair.
    """
    if len(neighbours) < rank:
        return torch.full((local,), UNKNOWN, device=batch.ids.device)

    def roots(columns: slice) -> tuple[Tensor, Tensor]:
        """The square roots of p and q, float [local, rows]."""
        queries = ((batch.audio_features, neighbours.audio), (batch.text_features, neighbours.text))
        p, q = ((per_query_log_probabilities(x[columns] @ rows.T, rank, shape) / 2).exp() for x, rows in queries)
        return p, q

    blocks = column_blocks(batch, local)
    p, q = roots(blocks[0])
    beaten = count = torch.zeros(local, dtype=torch.int64, device=batch.ids.device)
    for columns in blocks:
        other_p, other_q = (p, q) if columns == blocks[0] else roots(columns)
        by_audio, by_text = p @ other_q.T, q @ other_p.T
        if columns == blocks[0]:
            right = by_audio.diagonal().unsqueeze(1)
        allowed, own = contrast_masks(batch, local, columns)
        wrong = allowed & ~own
        beaten = beaten + ((right > by_audio) & wrong).sum(dim=1) + ((right > by_text) & wrong).sum(dim=1)
        count = count + 2 * wrong.sum(dim=1)
    return torch.where(count > 0, beaten / count.clamp(min=1), UNKNOWN).float()


@torch.no_grad()
def running_reliability(now: Tensor, before: Tensor, momentum: float) -> Tensor:
    """The running mean of r that the bank keeps a pair: float [local]; either may be UNKNOWN.

    Args:
        now: r of this step. before: the mean so far. momentum: weight of the mean so far.
    """
    mean = torch.where(before < 0, now, momentum * before + (1 - momentum) * now)
    return torch.where(now < 0, before, mean)


@torch.no_grad()
def wrong_share(reliability: Tensor) -> Tensor:
    """The share of wrong pairs among rows of known reliability: twice what their mean lacks to 1, at most 1.

    r of wrong pairs is uniform, so its mean is one half. Encoders that know nothing yet make every pair look wrong.

    Args:
        reliability: float [rows], UNKNOWN where nothing is known.

    Returns:
        A scalar; 0 where nothing is known.
    """
    known = reliability >= 0
    lacking = torch.where(known, 1.0 - reliability, torch.zeros_like(reliability)).sum() / known.sum().clamp(min=1)
    return (2.0 * lacking).clamp(max=1.0)


@torch.no_grad()
def reliability_weights(reliability: Tensor, gamma: float | Tensor) -> Tensor:
    """w = r^gamma, float [local]; pairs of unknown reliability weigh 1.

    They are not scaled to mean 1: a batch of wrong pairs should teach less than one of right pairs.
    """
    return torch.where(reliability < 0, torch.ones_like(reliability), reliability.clamp(min=0.0) ** gamma)
