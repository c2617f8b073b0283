"""Groups of recordings that are the same sound: shipped twice, encoded again, or louder by a little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.fft

RATE = 8000
SECONDS = 4.0
THRESHOLD = 0.85
PAIRS_AT_ONCE = 64


def merge_near_duplicates(waveforms: Sequence[np.ndarray], threshold: float = THRESHOLD) -> list[list[int]]:
    """Group waveforms whose normalised cross-correlation has a peak above `threshold` in magnitude.

    Only the first four seconds of each are compared. A waveform joins the first group whose *first* member it matches,
    so the first members, which stand for their groups, match one another nowhere.

    Every pair is covered, yet few are correlated: no lag can correlate more than the product of the two magnitude
    spectra sums to, and those sums for all pairs are one matrix product.

    Args:
        waveforms: float32 [samples] each, mono at 8 kHz; none empty or silent.
        threshold: between 0 and 1.

    Returns:
        Groups of indices, each ascending; ordered by their first members.
    """
    unit = [_unit(waveform) for waveform in waveforms]
    if not unit:
        return []
    size = scipy.fft.next_fast_len(2 * max(len(waveform) for waveform in unit), real=True)
    bound = _bounds(unit, size)
    groups: dict[int, list[int]] = {}
    for index, waveform in enumerate(unit):
        candidates = [first for first in groups if bound[index, first] > threshold]
        match = _first_match(waveform, candidates, unit, size, threshold)
        groups.setdefault(index if match is None else match, []).append(index)
    return list(groups.values())


def _unit(waveform: np.ndarray) -> np.ndarray:
    """The first seconds of float32 [samples], without offset and with unit energy."""
    head = waveform[: int(SECONDS * RATE)]
    head = head - head.mean()
    return (head / np.linalg.norm(head)).astype(np.float32)


def _bounds(unit: list[np.ndarray], size: int) -> np.ndarray:
    """float32 [n, n]: what the correlation of each pair can't exceed, sum_k |X_k| |Y_k| / size over all bins k."""
    spectra = np.empty((len(unit), size // 2 + 1), np.float32)
    for row, waveform in zip(spectra, unit, strict=True):
        row[:] = np.abs(scipy.fft.rfft(waveform, size))
    # A real signal's spectrum stands for both halves, all but its first bin and, in an even size, its last.
    spectra[:, 1 : (size + 1) // 2] *= np.sqrt(2)
    return spectra @ spectra.T / size


def _first_match(
    waveform: np.ndarray, candidates: list[int], unit: list[np.ndarray], size: int, threshold: float
) -> int | None:
    """The first of the candidates that correlates with the waveform above the threshold at some lag."""
    spectrum = np.conj(scipy.fft.rfft(waveform, size)) if candidates else None
    for start in range(0, len(candidates), PAIRS_AT_ONCE):
        chunk = candidates[start : start + PAIRS_AT_ONCE]
        stacked = np.zeros((len(chunk), size), np.float32)
        for row, candidate in zip(stacked, chunk, strict=True):
            row[: len(unit[candidate])] = unit[candidate]
        peaks = np.abs(scipy.fft.irfft(scipy.fft.rfft(stacked) * spectrum, size)).max(axis=1)
        if (peaks > threshold).any():
            return chunk[int(np.argmax(peaks > threshold))]
    return None
