"""Scenes of one to three recordings on a time line, and the sentences that say what is heard in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.signal

from ask_dist.data.shards import Clip

RATE = 16000
EVENTS = (1, 2, 3)
EVENT_SHARES = (0.2, 0.45, 0.35)
BACKGROUND_SHARE = 0.5
BACKGROUND_SECONDS = 3.0
BACKGROUND_GAIN = 0.3
LEVEL = 0.1
PEAK = 0.95
FADE_SECONDS = 0.01
TRIES = 50

# Phrases are singular or plural, so no template has a verb that would have to agree.
ONE = ("{0}", "the sound of {0}", "{0} can be heard", "nothing but {0}")
TWO = (
    "{0} followed by {1}",
    "{0}, then {1}",
    "{0} and then {1}",
    "first {0}, then {1}",
    "{1} after {0}",
    "after {0}, {1}",
)
THREE = (
    "{0} followed by {1}, then {2}",
    "{0}, then {1}, then {2}",
    "{0}, {1} and finally {2}",
    "first {0}, then {1} and at last {2}",
    "{0} and then {1}, followed by {2}",
)
BACKGROUND = (
    "{0} with {1} in the background",
    "{0} while {1} can be heard in the background",
    "{0}, all over the sound of {1}",
)


@dataclass(frozen=True)
class Sound:
    """A recording ready for scenes.

    Attributes:
        id: names its source.
        audio: float32 [samples] at 16 kHz, as `prepare` leaves it.
        phrase: what is heard, such as "a dog barking".
        kind: its class.
        licence: as its package states it.
    """

    id: str
    audio: np.ndarray
    phrase: str
    kind: str
    licence: str


def prepare(audio: np.ndarray) -> np.ndarray:
    """Take the silence off both ends of float32 [samples] at 16 kHz and bring it to one loudness.

    Silence is what stays 40 dB below the loudest 10 ms. Below 20 Hz, where nothing is heard, everything goes.
    """
    high_pass = scipy.signal.butter(2, 20, "highpass", fs=RATE, output="sos")
    heard = scipy.signal.sosfilt(high_pass, audio).astype(np.float32)
    hop = RATE // 100
    frames = np.pad(heard, (0, -len(heard) % hop)).reshape(-1, hop)
    levels = np.sqrt((frames**2).mean(axis=1))
    loud = np.flatnonzero(levels > levels.max() / 100)
    heard = heard[loud[0] * hop : (loud[-1] + 1) * hop]
    active = levels[loud]
    gain = min(LEVEL / np.sqrt((active**2).mean()), PEAK / np.abs(heard).max())
    return (heard * gain).astype(np.float32)


class SceneMaker:
    """Draws scenes from the sounds of one split.

    Scene `index` depends on the seed, the sounds and the index alone (and, where `distinct`, on the scenes before),
    so a larger split begins with the smaller one.

    Args:
        sounds: what to draw from, at least one.
        seed: anything numpy takes as a seed.
        seconds: length of a scene.
        zipf: draw the r-th class with probability proportional to 1/r, classes ordered by how many sounds they have;
            otherwise all classes alike.
        distinct: try not to make two scenes that ask for the same sentence, so that a search has one right answer.
    """

    def __init__(
        self, sounds: Sequence[Sound], seed: Sequence[int], *, seconds: float, zipf: bool, distinct: bool
    ) -> None:
        self.seed = list(seed)
        self.samples = round(seconds * RATE)
        self.by_kind: dict[str, list[Sound]] = {}
        for sound in sounds:
            self.by_kind.setdefault(sound.kind, []).append(sound)
        self.kinds = sorted(self.by_kind, key=lambda kind: (-len(self.by_kind[kind]), kind))
        weights = 1 / np.arange(1, len(self.kinds) + 1) if zipf else np.ones(len(self.kinds))
        self.weights = weights / weights.sum()
        self.told: set[tuple[str, ...]] | None = set() if distinct else None

    def make(self, key: str, index: int) -> Clip:
        """The scene `index` as a clip: float32 [seconds * 16000], peak below 1, and one caption."""
        rng = np.random.default_rng([*self.seed, index])
        events, background = self._draw(rng)
        for _ in range(TRIES):
            story = tuple(sound.phrase for sound in events) + ((background.phrase, "behind") if background else ())
            if self.told is None or story not in self.told:
                break
            events, background = self._draw(rng)
        if self.told is not None:
            self.told.add(story)
        sounds = [*events, background] if background else events
        return Clip(
            key=key,
            audio=mix([sound.audio for sound in events], background.audio if background else None, self.samples, rng),
            sample_rate=RATE,
            captions=(caption([sound.phrase for sound in events], background.phrase if background else None, rng),),
            classes=tuple(sound.kind for sound in sounds),
            extra={
                "recordings": [sound.id for sound in sounds],
                "licences": sorted({sound.licence for sound in sounds}),
                "templates": True,
            },
        )

    def _draw(self, rng: np.random.Generator) -> tuple[list[Sound], Sound | None]:
        """One to three sounds of different classes in the order they are heard, and perhaps one of them behind."""
        count = min(int(rng.choice(EVENTS, p=EVENT_SHARES)), len(self.kinds))
        kinds = rng.choice(len(self.kinds), size=count, replace=False, p=self.weights)
        choices = [self.by_kind[self.kinds[kind]] for kind in kinds]
        sounds = [choice[int(rng.integers(len(choice)))] for choice in choices]
        longest = max(range(count), key=lambda place: len(sounds[place].audio))
        is_long = len(sounds[longest].audio) >= BACKGROUND_SECONDS * RATE
        if count > 1 and is_long and rng.random() < BACKGROUND_SHARE:
            return sounds[:longest] + sounds[longest + 1 :], sounds[longest]
        return sounds, None


def mix(
    events: Sequence[np.ndarray], background: np.ndarray | None, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Place the events one after another at random, none overlapping, and the background under them from the start.

    An event that is longer than its share of the scene is cut to it.

    Returns:
        float32 [samples], peak at most 0.95.
    """
    cut = [_fade(event[: samples // len(events)]) for event in events]
    gaps = rng.dirichlet(np.ones(len(cut) + 1)) * (samples - sum(map(len, cut)))
    gains = 10 ** (rng.uniform(-3, 3, len(cut)) / 20)
    scene = np.zeros(samples, np.float32)
    if background is not None:
        under = _fade(background[:samples])
        scene[: len(under)] += BACKGROUND_GAIN * under
    end = 0.0
    for event, gap, gain in zip(cut, gaps, gains, strict=False):
        start = int(end + gap)
        scene[start : start + len(event)] += gain.astype(np.float32) * event
        end += gap + len(event)
    return scene * np.float32(min(1, PEAK / np.abs(scene).max()))


def caption(events: Sequence[str], background: str | None, rng: np.random.Generator) -> str:
    """A sentence that tells one to three events in order, and what is heard behind them."""
    templates = {1: ONE if background is None else ONE[:1], 2: TWO, 3: THREE}[len(events)]
    sentence = templates[int(rng.integers(len(templates)))].format(*events)
    if background is None:
        return sentence
    return BACKGROUND[int(rng.integers(len(BACKGROUND)))].format(sentence, background)


def _fade(audio: np.ndarray) -> np.ndarray:
    """A copy that rises and falls in 10 ms (a quarter of a shorter sound each), so that a cut does not click."""
    faded = audio.copy()
    length = min(int(FADE_SECONDS * RATE), len(faded) // 4)
    if length:
        ramp = np.linspace(0, 1, length, dtype=np.float32)
        faded[:length] *= ramp
        faded[-length:] *= ramp[::-1]
    return faded
