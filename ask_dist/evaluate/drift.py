"""The two faults that a knowledge bank is meant to mend, as numbers: rows that went stale, and gradients kept local.

RDM, the representation-drift mismatch, is `mean_drift` and `neighbour_overlap` between stored and freshly encoded
rows. GLB, the gradient locality bottleneck, is `out_of_span_share` of the embedding gradients. `auroc` says how well
a reliability tells right pairs from swapped ones. The definitions are this project's own reading of the method.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata


def mean_drift(stored: np.ndarray, fresh: np.ndarray) -> float:
    """Mean of 1 - cos(stored row, fresh row): 0 where nothing moved, 2 at most.

    Args:
        stored: [n, d] rows as the bank holds them, any float type, any length (they are scaled to unit length).
        fresh: [n, d] the same rows encoded by the present weights.

    Raises:
        ValueError: the shapes differ, or there is no row.
    """
    stored, fresh = _unit_pair(stored, fresh, least=1)
    return float(1.0 - (stored * fresh).sum(axis=1, dtype=np.float64).mean())


def neighbour_overlap(stored: np.ndarray, fresh: np.ndarray, k: int = 10, chunk: int = 1024) -> float:
    """Mean share of a row's k nearest within `stored` that are also among its k nearest within `fresh`, from 0 to 1.

    Nearest means by cosine, the row itself left out. This, more than `mean_drift`, is what a search of the bank feels:
    a rotation common to all rows moves every row and leaves the overlap at 1.

    Args:
        stored, fresh: [n, d] as in `mean_drift`.
        k: neighbours a row; n - 1 where there are fewer.
        chunk: rows compared at a time; the peak is two float32 [chunk, n] matrices.

    Raises:
        ValueError: the shapes differ, or there are fewer than two rows.
    """
    stored, fresh = _unit_pair(stored, fresh, least=2)
    rows = len(stored)
    k = min(k, rows - 1)
    shared = 0
    for start in range(0, rows, chunk):
        own = np.arange(start, min(start + chunk, rows))
        before, after = _nearest(stored, own, k), _nearest(fresh, own, k)
        member = np.zeros((len(own), rows), dtype=bool)
        np.put_along_axis(member, before, True, axis=1)
        shared += int(np.take_along_axis(member, after, axis=1).sum())
    return shared / (rows * k)


def out_of_span_share(gradient: torch.Tensor, features: torch.Tensor) -> float:
    """Share, from 0 to 1, of the gradients' squared norm that lies outside the span of the batch's embeddings.

    With an in-batch loss on similarities of unit rows this is 0: the gradient of each row is a sum of other rows of the
    batch and of the row itself. What knowledge from outside the batch teaches shows up here. Where the features span
    the whole space (2n >= d, as a rule) the share is 0 whatever the loss; probe with a batch smaller than that.

    Args:
        gradient: [n, d] gradients of the loss with respect to embeddings.
        features: [m, d] every embedding of the batch, audio and text together. May be rank deficient.

    Returns:
        0.0 where the gradient is zero.

    Raises:
        ValueError: the widths differ, or something is not finite.
    """
    gradient, features = gradient.detach().double(), features.detach().double()
    if gradient.shape[1] != features.shape[1]:
        raise ValueError(f"gradients are {gradient.shape[1]} wide but features {features.shape[1]}: pass one space")
    if not (torch.isfinite(gradient).all() and torch.isfinite(features).all()):
        raise ValueError("gradients or features hold a value that is not finite: skip this step's diagnostic")
    total = gradient.square().sum()
    if total == 0:
        return 0.0
    _, singular, rows = torch.linalg.svd(features, full_matrices=False)
    # Embeddings come from float32 or less, so directions below their rounding are noise and not part of the span.
    basis = rows[singular > singular[0] * max(features.shape) * torch.finfo(torch.float32).eps]
    outside = gradient - (gradient @ basis.T) @ basis
    return float((outside.square().sum() / total).clamp(0.0, 1.0))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a positive outscores a negative, ties counting half (Mann-Whitney U): 0.5 tells nothing, 1 all.

    Args:
        scores: [n] numbers, for example the reliability of a pair.
        labels: [n] true for a positive, for example a pair that was not swapped.

    Raises:
        ValueError: the lengths differ, or one of the two classes is empty.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must be one row of equal length")
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        raise ValueError(f"{positives} positives and {negatives} negatives: AUROC needs at least one of each")
    above = rankdata(scores)[labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _unit_pair(stored: np.ndarray, fresh: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    if stored.shape != fresh.shape or stored.ndim != 2:
        raise ValueError(f"stored {stored.shape} and fresh {fresh.shape} must be two [n, d] arrays of one shape")
    if len(stored) < least:
        raise ValueError(f"{len(stored)} rows are too few: at least {least} needed")
    return _unit(stored), _unit(fresh)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _nearest(rows: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    similarity = rows[own] @ rows.T
    similarity[np.arange(len(own)), own] = -np.inf
    return np.argpartition(-similarity, k - 1, axis=1)[:, :k]
