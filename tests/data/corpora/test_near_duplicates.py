"""Near-duplicates against the obvious reference: correlate every pair at every lag."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal

from ask_dist.data.corpora.near_duplicates import RATE, SECONDS, THRESHOLD, merge_near_duplicates


def peak(a: np.ndarray, b: np.ndarray) -> float:
    """The largest normalised cross-correlation of the compared parts, directly by definition."""
    a, b = (x[: int(SECONDS * RATE)].astype(np.float64) for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return float(np.abs(np.correlate(a, b, "full")).max() / np.linalg.norm(a) / np.linalg.norm(b))


def reference(waveforms: list[np.ndarray], threshold: float) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, waveform in enumerate(waveforms):
        for group in groups:
            if peak(waveforms[group[0]], waveform) > threshold:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def zoo(seed: int, count: int) -> list[np.ndarray]:
    """Decaying tones, filtered noises and clicks, of which about half are altered copies of an earlier one."""
    rng = np.random.default_rng(seed)
    sounds: list[np.ndarray] = []
    for _ in range(count):
        length = int(rng.integers(200, 3000))
        time = np.arange(length) / RATE
        kind = rng.integers(6) if sounds else 0
        if kind == 0:
            sound = np.sin(2 * np.pi * rng.uniform(60, 2000) * time) * np.exp(-time * rng.uniform(2, 40))
        elif kind == 1:
            sound = scipy.signal.lfilter([1], [1, -rng.uniform(0, 0.95)], rng.normal(size=length))
        elif kind == 2:
            sound = np.exp(-time * rng.uniform(20, 400)) * rng.normal(size=length)
        else:
            source = sounds[int(rng.integers(len(sounds)))]
            sound = rng.choice([-1, 1]) * rng.uniform(0.1, 1) * np.pad(source, tuple(rng.integers(0, 500, 2)))
            sound = sound + rng.uniform(0, 0.8) * sound.std() * rng.normal(size=len(sound))
        sounds.append(sound.astype(np.float32))
    return sounds


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.5, THRESHOLD])
def test_groups_equal_a_full_comparison(seed: int, threshold: float) -> None:
    sounds = zoo(seed, 40)
    groups = merge_near_duplicates(sounds, threshold)
    assert groups == reference(sounds, threshold)
    assert 1 < len(groups) < len(sounds)


def test_copies_are_merged_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    noise, other = rng.normal(size=(2, 4000)).astype(np.float32)
    late = np.pad(noise, (700, 0))
    quiet_upside_down = -0.01 * noise
    with_offset = noise + 0.5
    noisy = noise + 0.4 * other
    too_noisy = noise + 0.8 * other  # 1 / sqrt(1 + 0.64) = 0.78
    waveforms = [noise, other, late, quiet_upside_down, with_offset, noisy, too_noisy]
    assert merge_near_duplicates(waveforms) == [[0, 2, 3, 4, 5], [1], [6]]


def test_only_the_first_seconds_are_compared() -> None:
    head, tail = np.random.default_rng(1).normal(size=(2, int(SECONDS * RATE))).astype(np.float32)
    assert merge_near_duplicates([head, np.concatenate([head, tail]), np.concatenate([tail, head])]) == [[0, 1], [2]]


def test_no_waveforms_make_no_groups() -> None:
    assert merge_near_duplicates([]) == []
