"""Acoustic fingerprints: they recognise a sound that was encoded anew, resampled, made louder or cut.

After Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): a word of 32 bits a frame, the
signs of how the differences between neighbouring bands change from frame to frame. They compare three seconds of music.
A clip may be one second, mostly silent or one steady tone, so four things are added:

- each frame is brought to one level first: any sound that swells and fades would have the same signs all the time;
- a bit counts only where it is known: something is heard there, and it changes;
- bits agree only as far as they do so more often than their shares of ones would have it;
- levels must rise and fall alike, lest an event that two clips share hide one that they don't.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.fft

from ask_dist.data.audio import resample

RATE = 5000  # Hz
FRAME, HOP = 1024, 64  # samples: 205 and 12.8 ms
BANDS = np.geomspace(300, 2000, 34)  # Hz, the edges of 33
BLOCK = 2048  # frames transformed at a time
QUIET = 2e-5  # share of the loudest frame's energy that neighbouring bands must have
ROUNDING = 1e-9  # share of the energy of a tone at the peak of the clip; what is less may be errors of rounding
TINY = 1e-30
STEADY = 0.02  # share of their own energy that a change must be
DOUBTFUL = 3  # bits of a word that are looked up both ways

LOOKED_UP, VARIED = 12, 3  # known bits, and of these ones and zeros each, of a word that can find others
COMMON = 1000  # places of a word above which it tells too little
TRIED = 100  # alignments that are compared, those with the most equal words
OVERLAP = 0.5  # share of the shorter clip, and of what is known of it
AGREEMENT = 0.7  # least correlation of the bits known in both
# By chance n bits correlate with a standard deviation of 3 / sqrt(n), three times that of independent ones, says the
# paper's analysis of false positives. So clips with fewer than 225 known bits match nothing.
DEVIATIONS = 5
LOUDNESS = 0.95  # least cosine between levels


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a sound, a row a frame of 12.8 ms; too short a sound has none.

    Attributes:
        bits: uint32 [frames], 32 signs; zero where they are not known.
        known: uint32 [frames], a one for each sign that means something.
        doubtful: uint32 [frames], a one for each of the three signs that are nearest to being another.
        level: float32 [frames], the amplitude between 300 and 2000 Hz.
    """

    bits: np.ndarray
    known: np.ndarray
    doubtful: np.ndarray
    level: np.ndarray

    def __len__(self) -> int:
        return len(self.bits)

    def part(self, first: int, last: int) -> Fingerprint:
        """Frames first..last."""
        rows = slice(first, last)
        return Fingerprint(self.bits[rows], self.known[rows], self.doubtful[rows], self.level[rows])

    @property
    def searchable(self) -> np.ndarray:
        """int64 [n]: the frames whose words say enough to look others up by them."""
        known, ones = np.bitwise_count(self.known), np.bitwise_count(self.bits)
        return np.flatnonzero((known >= LOOKED_UP) & (np.minimum(ones, known - ones) >= VARIED))


def fingerprint(audio: np.ndarray, rate: int) -> Fingerprint:
    """The fingerprint of float32 [samples] at `rate` Hz; equation (1) of the paper.

    It is the same at any volume, and nearly the same after any encoding that leaves 300 to 2000 Hz as they are.
    """
    energy = _energies(audio := resample(audio, rate, RATE))
    total, pair = energy.sum(axis=1), energy[:, :-1] + energy[:, 1:]
    peak = (FRAME / 4 * np.abs(audio).max(initial=0)) ** 2
    loud = pair > max(QUIET * total.max(), ROUNDING * peak)
    heard = loud[1:] & loud[:-1]
    shape = energy / np.maximum(total, TINY)[:, None]
    slope, sides = shape[:, :-1] - shape[:, 1:], shape[:, :-1] + shape[:, 1:]
    change, around = slope[1:] - slope[:-1], sides[1:] + sides[:-1]
    share = np.divide(change, around, out=np.zeros_like(change), where=heard)
    known = np.abs(share) > STEADY
    # A zero stands for a negative change and for none alike: a sign is in doubt where a change is hardly positive.
    doubt = np.where(heard, np.abs(share - STEADY), np.inf)
    doubtful = np.argpartition(doubt, DOUBTFUL, axis=1)[:, :DOUBTFUL]
    return Fingerprint(
        bits=_words(known & (share > 0)),
        known=_words(known),
        doubtful=(np.uint32(1) << doubtful.astype(np.uint32)).sum(axis=1, dtype=np.uint32),
        level=np.sqrt(total[1:]),
    )


def _words(flags: np.ndarray) -> np.ndarray:
    """uint32 [frames] of bool [frames, 32]."""
    return np.packbits(flags, axis=1, bitorder="little").view("<u4")[:, 0]


def _energies(audio: np.ndarray) -> np.ndarray:
    """float32 [frames, 33] of float32 [samples] at 5 kHz: the energy of each band under a Hann window."""
    if len(audio) < FRAME:
        return np.zeros((1, len(BANDS) - 1), np.float32)
    window = np.hanning(FRAME + 1)[:-1].astype(np.float32)
    edges = np.searchsorted(scipy.fft.rfftfreq(FRAME, 1 / RATE), BANDS)
    frames = np.lib.stride_tricks.sliding_window_view(audio, FRAME)[::HOP]
    parts = []
    for start in range(0, len(frames), BLOCK):
        spectrum = scipy.fft.rfft(frames[start : start + BLOCK] * window)[:, : edges[-1]]
        power = spectrum.real**2 + spectrum.imag**2
        parts.append(np.add.reduceat(power, edges[:-1], axis=1))
    return np.concatenate(parts) / np.diff(edges).astype(np.float32)


class Fingerprints:
    """The fingerprints of many sounds, to find one of them that another sounds like.

    Memory: about 20 bytes a frame, 1.6 kB a second of sound.

    Args:
        named: names and fingerprints.
    """

    def __init__(self, named: Iterable[tuple[str, Fingerprint]]) -> None:
        pairs = list(named)
        self._names = [name for name, _ in pairs]
        self._prints = [found for _, found in pairs]
        self._starts = np.cumsum([0, *map(len, self._prints)])[:-1]
        nothing = np.zeros(0, np.int64)
        rows = [start + found.searchable for start, found in zip(self._starts, self._prints, strict=True)]
        words = [found.bits[found.searchable] for found in self._prints]
        self._rows, self._words = np.concatenate([nothing, *rows]), np.concatenate([nothing.astype(np.uint32), *words])
        order = np.argsort(self._words, kind="stable")
        self._rows, self._words = self._rows[order], self._words[order]

    def match(self, audio: np.ndarray, rate: int) -> str | None:
        """The name of a sound that float32 [samples] at `rate` Hz holds, or is a part of, for the most part; or None.

        That is: at some alignment at least half of the shorter one, in time and in what is known of it, agrees.
        """
        heard = fingerprint(audio, rate)
        found = [
            (_likeness(heard, self._prints[number], offset), -number) for number, offset in self._alignments(heard)
        ]
        likeness, number = max(found, default=(0.0, 0))
        return self._names[-number] if likeness > 0 else None

    def _alignments(self, heard: Fingerprint) -> Iterator[tuple[int, int]]:
        """Sounds that have words in common with the heard one, by number, and how many frames later they have them."""
        frames = heard.searchable
        words, rest = heard.bits[frames][:, None], heard.doubtful[frames][:, None]
        for _ in range(DOUBTFUL):
            lowest = rest & (~rest + np.uint32(1))
            words, rest = np.concatenate([words, words ^ lowest], axis=1), rest ^ lowest
        frames = np.repeat(frames, words.shape[1])
        first = np.searchsorted(self._words, words.ravel(), "left")
        counts = np.searchsorted(self._words, words.ravel(), "right") - first
        counts[counts > COMMON] = 0
        places = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        rows = self._rows[places]
        numbers = np.searchsorted(self._starts, rows, "right") - 1
        offsets = rows - self._starts[numbers] - np.repeat(frames, counts)
        found, votes = np.unique((numbers << 32) + offsets + (1 << 31), return_counts=True)
        for alignment in found[np.argsort(-votes, kind="stable")[:TRIED]].tolist():
            yield alignment >> 32, (alignment & (1 << 32) - 1) - (1 << 31)


def _likeness(one: Fingerprint, other: Fingerprint, offset: int) -> float:
    """How like two sounds are where frame 0 of the one is frame `offset` of the other; 0 where they are not the same.

    It is the covariance of their bits, summed over all that are known in both.
    """
    first, last = max(0, -offset), min(len(one), len(other) - offset)
    if last - first < OVERLAP * min(len(one), len(other)):
        return 0.0
    here, there = one.part(first, last), other.part(first + offset, last + offset)
    both = here.known & there.known
    known, least = np.bitwise_count(both), min(int(np.bitwise_count(side.known).sum()) for side in (one, other))
    if known.sum() < OVERLAP * least:
        return 0.0
    if here.level @ there.level < LOUDNESS * np.sqrt((here.level @ here.level) * (there.level @ there.level)):
        return 0.0
    # About the mean of each frame: bits that are the same in all bands tell nothing.
    ones = [np.bitwise_count(bits & both).astype(np.float64) for bits in (here.bits, there.bits)]
    common = np.bitwise_count(here.bits & there.bits).astype(np.float64)
    size = np.maximum(known, 1)
    spread = np.sqrt(np.prod([(count - count**2 / size).sum() for count in ones]))
    covariance = (common - ones[0] * ones[1] / size).sum()
    deviation = 3 * np.sqrt(spread) / 2  # of n even bits, whose variances of 1/4 make a spread of n / 4
    return float(covariance) if covariance >= max(AGREEMENT * spread, DEVIATIONS * deviation) else 0.0
