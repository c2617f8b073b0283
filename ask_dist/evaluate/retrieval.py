"""Retrieval metrics in both directions, for any number of captions a clip.

Ties count against us: a wrong item whose similarity equals the right one's ranks before it, and so does one whose
similarity is not a number. Embeddings that have collapsed onto one point therefore score nothing rather than
everything. For the same reason two clips with word-for-word equal captions can't both be first from audio to text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ask_dist.errors import InputError

CUTOFFS = (1, 5, 10)
# Cosines closer than this are a tie. A float32 product of 512 numbers is good to about 1e-7, and the rounding of two
# equal columns may differ, so comparing for equality would miss the ties of a collapsed encoder.
TIE = 1e-6


@dataclass(frozen=True)
class QueryRanks:
    """What every query of one direction found.

    Attributes:
        rank: int64 [q], the place of the best-placed right item, from 1.
        average_precision: float64 [q], average precision within the first ten, from 0 to 1. The normaliser is
            min(number of right items, 10), so that a perfect list scores 1.
    """

    rank: np.ndarray
    average_precision: np.ndarray

    def hits(self, k: int) -> np.ndarray:
        """float64 [q]: 100 where a right item is among the first k, else 0. The mean is R@k in percent."""
        return 100.0 * (self.rank <= k)

    def metrics(self) -> dict[str, float]:
        """R@1, R@5, R@10 and mAP@10 in percent, and median_rank, a rank from 1."""
        recall = {f"R@{k}": float(self.hits(k).mean()) for k in CUTOFFS}
        precision = 100.0 * float(self.average_precision.mean())
        return recall | {"mAP@10": precision, "median_rank": float(np.median(self.rank))}


def retrieval_metrics(
    audio_features: torch.Tensor, text_features: torch.Tensor, owner: torch.Tensor, chunk: int = 256
) -> dict[str, dict[str, float]]:
    """`QueryRanks.metrics` for "text_to_audio" and "audio_to_text". Arguments and errors as in `ranks`."""
    return {
        direction: found.metrics() for direction, found in ranks(audio_features, text_features, owner, chunk).items()
    }


@torch.no_grad()
def ranks(
    audio_features: torch.Tensor, text_features: torch.Tensor, owner: torch.Tensor, chunk: int = 256
) -> dict[str, QueryRanks]:
    """Rank every text among all clips and every clip among all texts, by cosine.

    Args:
        audio_features: [n, d], any float type and device; scaled to unit length here.
        text_features: [m, d] on the same device.
        owner: int64 [m], the position of the clip that each text describes. A text has one right clip; a clip has as
            many right texts as it owns, one at least.
        chunk: queries compared at a time; memory goes with a few matrices of [chunk, max(n, m)].

    Returns:
        {"text_to_audio": m queries in the order of the texts, "audio_to_text": n queries in the order of the clips}.

    Raises:
        InputError: the shapes don't fit, a text's owner is no clip, or a clip owns no text.
    """
    _check(audio_features, text_features, owner)
    audio, text = F.normalize(audio_features.float(), dim=1), F.normalize(text_features.float(), dim=1)
    owner = owner.to(audio.device)
    clips, texts = torch.arange(len(audio), device=owner.device), torch.arange(len(text), device=owner.device)
    to_audio = _wrong_ahead(text, audio, texts, owner, clips, chunk)
    to_text = _wrong_ahead(audio, text, owner, texts, owner, chunk)
    return {
        "text_to_audio": _summarise(to_audio, texts.cpu().numpy(), len(text)),
        "audio_to_text": _summarise(to_text, owner.cpu().numpy(), len(audio)),
    }


def bootstrap_interval(
    values: np.ndarray, seed: int, cluster: np.ndarray | None = None, resamples: int = 1000
) -> tuple[float, float]:
    """The 95% percentile-bootstrap interval of the mean of per-query values.

    Args:
        values: [q], for example `QueryRanks.hits(1)`.
        seed: of the resampling; equal seeds give equal intervals.
        cluster: int64 [q], queries that stand or fall together, resampled as one. Pass `owner` for text_to_audio: the
            captions of a clip are not independent, and without it the interval would be too narrow.
        resamples: how often the queries are drawn anew.

    Raises:
        ValueError: there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("0 values have no interval: pass at least one query")
    members = np.arange(len(values)) if cluster is None else np.unique(cluster, return_inverse=True)[1]
    sums, counts = np.bincount(members, weights=values), np.bincount(members)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(0, len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _check(audio: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> None:
    if audio.ndim != 2 or text.ndim != 2 or audio.shape[1] != text.shape[1]:
        raise InputError(f"audio {tuple(audio.shape)} and text {tuple(text.shape)} must be [n, d] and [m, d], one d")
    if owner.shape != (len(text),) or owner.is_floating_point():
        raise InputError(f"owner {tuple(owner.shape)} must hold one clip position for each of {len(text)} texts")
    if len(text) == 0:
        raise InputError("0 captions to evaluate: give a split that holds captioned clips")
    if int(owner.min()) < 0 or int(owner.max()) >= len(audio):
        raise InputError(f"owners {int(owner.min())}..{int(owner.max())} must lie in 0..{len(audio) - 1}, the clips")
    silent = torch.bincount(owner, minlength=len(audio)) == 0
    if silent.any():
        first = int(silent.nonzero()[0])
        raise InputError(
            f"{int(silent.sum())} of {len(audio)} clips have no caption, the first is clip {first}: leave them out"
        )


def _wrong_ahead(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    query: torch.Tensor,
    right: torch.Tensor,
    candidate_owner: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """int64 [p]: how many wrong candidates rank before the right one, for each query and right candidate."""
    # Written into one tensor: small results kept between the large temporaries fragment the heap, which then grew to
    # 1.1 GB instead of 73 MB for 25,000 texts, 5,000 clips and a chunk of 64.
    ahead = torch.empty_like(right)
    for start in range(0, len(right), chunk):
        part = slice(start, start + chunk)
        similarity = queries[query[part]] @ candidates.T
        behind = similarity < similarity.gather(1, right[part, None]) - TIE
        wrong = candidate_owner[None, :] != candidate_owner[right[part]][:, None]
        ahead[part] = (wrong & ~behind).sum(dim=1)
    return ahead


def _summarise(wrong_ahead: torch.Tensor, query: np.ndarray, queries: int) -> QueryRanks:
    """Join the pairs of each query: its i-th best right item stands after i - 1 right ones and those wrong ones."""
    ahead = wrong_ahead.cpu().numpy()
    order = np.lexsort((ahead, query))
    ahead, query = ahead[order], query[order]
    right_items = np.bincount(query, minlength=queries)
    first = np.cumsum(right_items) - right_items
    place = np.arange(len(query)) - first[query] + 1
    rank = ahead + place
    precision = np.bincount(query, weights=np.where(rank <= 10, place / rank, 0.0), minlength=queries)
    return QueryRanks(rank=rank[first], average_precision=precision / np.minimum(right_items, 10))
