"""The quickstart corpus: short scenes of sampled instruments with captions that say what is heard.

A scene holds one to three events, such as "two soft low shakuhachi notes followed by three loud claves sounds". Its
classes follow a Zipf law. Everything is drawn from the seed, and every scene of every split has a render seed of its
own (key of each note, velocity, timing). Within validation, and within test, no two scenes have the same events, so
that each caption has one right clip; a description may occur in several splits, always with another rendering.

The sounds are those of the General MIDI SoundFont that the pretty_midi wheel carries, rendered at 16 kHz with
tinysoundfont. general_midi.csv lists the ones in use. Left out: presets whose filter is unstable at 16 kHz (synth
bass 2, halo pad, shamisen), and those that one can hardly tell from another one that is in the list (bright piano,
slow strings, fiddle, agogo, woodblock and tom presets, and six drums).
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ask_dist.data.captions import swap_captions
from ask_dist.data.corpora import BuildSummary, forget_recipe, recipe_matches, summarize, write_recipe
from ask_dist.data.pack import EncodedClip, encode_clip, write_shards
from ask_dist.data.shards import Clip
from ask_dist.errors import InputError

VERSION = 1
SOURCE = "TimGM6mb.sf2, a General MIDI SoundFont by Tim Brechbill, as the pretty_midi wheel carries it"
LICENCE = "GPL-2.0 (the SoundFont, as Debian's timgm6mb-soundfont states; pretty_midi itself is MIT)"
SAMPLE_RATE = 16000

VELOCITIES = {"soft": (24, 34), "": (60, 72), "loud": (118, 127)}
KEYS = {"low": (43, 47), "": (57, 63), "high": (70, 76)}
COUNTS = ("one", "two", "three", "four")
CONNECTIVES = (" followed by ", " then ", " and then ")
REFERENCE_RMS = 0.2  # of a note at full velocity, so that "soft" and "loud" mean the same for every class
ZIPF_EXPONENT = 1.0
FLUSH = SAMPLE_RATE // 20  # silenced voices fade for some milliseconds; then nothing is left of the scene before


@dataclass(frozen=True)
class Sound:
    """One row of general_midi.csv; kind is melodic (has a pitch), effect or percussion."""

    kind: str
    number: int
    name: str


@dataclass(frozen=True)
class Event:
    """`count` notes of one sound; "" stands for a middle loudness or pitch, which captions don't mention."""

    sound: Sound
    count: int
    loudness: str
    pitch: str

    def words(self) -> str:
        noun = ("note" if self.sound.kind == "melodic" else "sound") + ("s" if self.count > 1 else "")
        return " ".join(filter(None, (COUNTS[self.count - 1], self.loudness, self.pitch, self.sound.name, noun)))


@dataclass(frozen=True)
class Scene:
    """All that is needed to render a scene; `seed` draws what the caption leaves open."""

    key: str
    seed: int
    events: tuple[Event, ...]
    caption: str
    swapped: bool = False


def build(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 5000,
    validation: int = 500,
    test: int = 1000,
    swap_captions: float = 0.0,
    seconds: float = 4.0,
    processes: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
) -> BuildSummary:
    """Build the corpus in `folder`, unless it is there already with the same parameters.

    Args:
        folder: gets train/, validation/ and test/ with their shards, and recipe.json.
        seed: draws everything.
        train: scenes of the training split; likewise validation and test.
        swap_captions: share of the training scenes whose captions are permuted among themselves, none keeping its
            own; their JSON says `"swapped": true`.
        seconds: length of a scene.
        processes: that render.
        progress: called with the split, scenes done and scenes in all.

    Raises:
        InputError: a parameter is out of range, or pretty_midi or tinysoundfont is not installed.
    """
    folder = Path(folder)
    splits = {"train": train, "validation": validation, "test": test}
    if seed < 0:
        raise InputError(f"seed is {seed}: give 0 or more")
    if min(splits.values()) < 1:
        raise InputError(f"scenes per split are {splits}: give at least 1 for each")
    if not 0 <= swap_captions <= 1:
        raise InputError(f"swap_captions is {swap_captions}: give a share from 0 to 1")
    if seconds < 2:
        raise InputError(f"seconds is {seconds}: three events need at least 2")
    parameters = {
        "recipe": "sampled_scenes",
        "version": VERSION,
        "seed": seed,
        **splits,
        "swap_captions": swap_captions,
        "seconds": seconds,
    }
    if not recipe_matches(folder, parameters):
        soundfont()
        forget_recipe(folder)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            for number, (split, count) in enumerate(splits.items()):
                scenes = draw_scenes(split, number, count, seed)
                if split == "train":
                    scenes = swap(scenes, swap_captions, seed)
                clips = pool.map(functools.partial(render, seconds=seconds), scenes, chunksize=16)
                write_shards(_counted(clips, split, count, progress), folder / split, split)
        write_recipe(folder, parameters)
    return summarize(folder, SOURCE, LICENCE)


def _counted(
    clips: Iterator[EncodedClip], split: str, total: int, progress: Callable[[str, int, int], None] | None
) -> Iterator[EncodedClip]:
    for done, clip in enumerate(clips, 1):
        yield clip
        if progress:
            progress(split, done, total)


def draw_scenes(split: str, number: int, count: int, seed: int) -> list[Scene]:
    """The first `count` scenes of a split, the `number`-th of the corpus; distinct events in all splits but train."""
    sounds, weights = zipf(seed)
    scenes: list[Scene] = []
    met: set[tuple[Event, ...]] = set()
    for index in itertools.count():
        if len(scenes) == count:
            break
        scene_seed = (seed << 40) + (number << 32) + index
        rng = np.random.default_rng(scene_seed)
        events = tuple(draw_event(sound, rng) for sound in draw_sounds(sounds, weights, rng))
        caption = events[0].words()
        for event in events[1:]:
            caption += CONNECTIVES[rng.integers(len(CONNECTIVES))] + event.words()
        if split == "train" or events not in met:
            met.add(events)
            scenes.append(Scene(f"{split}-{len(scenes):06d}", scene_seed, events, caption))
    return scenes


def zipf(seed: int) -> tuple[tuple[Sound, ...], np.ndarray]:
    """All sounds in an order drawn from the seed, and their probabilities [sounds], falling as 1 / rank."""
    sounds = all_sounds()
    order = np.random.default_rng([seed, 1]).permutation(len(sounds))
    weights = 1.0 / np.arange(1, len(sounds) + 1) ** ZIPF_EXPONENT
    return tuple(sounds[i] for i in order), weights / weights.sum()


def draw_sounds(sounds: tuple[Sound, ...], weights: np.ndarray, rng: np.random.Generator) -> list[Sound]:
    """One to three different sounds."""
    return [sounds[i] for i in rng.choice(len(sounds), size=rng.integers(1, 4), replace=False, p=weights)]


def draw_event(sound: Sound, rng: np.random.Generator) -> Event:
    """Count, loudness and, where the sound has one, pitch."""
    count, loudness, pitch = rng.integers((len(COUNTS), len(VELOCITIES), len(KEYS)))
    return Event(
        sound, int(count) + 1, list(VELOCITIES)[loudness], list(KEYS)[pitch] if sound.kind == "melodic" else ""
    )


def swap(scenes: list[Scene], share: float, seed: int) -> list[Scene]:
    """Permute the captions of a drawn `share` of the scenes among themselves so that each gets another's words."""
    captions, swapped = swap_captions([scene.caption for scene in scenes], share, seed)
    return [
        replace(scene, caption=caption, swapped=bool(changed))
        for scene, caption, changed in zip(scenes, captions, swapped, strict=True)
    ]


def render(scene: Scene, seconds: float) -> EncodedClip:
    """Play a scene and encode it; the same scene gives the same bytes in any process and after any other scene."""
    samples = round(seconds * SAMPLE_RATE)
    audio = player().play(scene.events, samples, np.random.default_rng([scene.seed, 1]))
    events = [
        {"class": event.sound.name, "count": event.count, "loudness": event.loudness, "pitch": event.pitch}
        for event in scene.events
    ]
    classes = tuple(event.sound.name for event in scene.events)
    extra = {"events": events, "seed": scene.seed, "swapped": scene.swapped}
    return encode_clip(Clip(scene.key, audio, SAMPLE_RATE, (scene.caption,), classes, extra))


def score(event: Event, start: int, length: int, rng: np.random.Generator) -> Iterator[tuple[int, int, int, int]]:
    """The notes of an event that has `length` samples from `start`: (first sample, last sample, key, velocity)."""
    step = min(SAMPLE_RATE // 2, round(length / (event.count + 0.3)))
    for note in range(event.count):
        begin = start + round(step * (note + rng.uniform(0, 0.15)))
        end = begin + round(step * rng.uniform(0.6, 0.8))
        key = (
            event.sound.number if event.sound.kind == "percussion" else rng.integers(*KEYS[event.pitch], endpoint=True)
        )
        yield begin, end, int(key), int(rng.integers(*VELOCITIES[event.loudness], endpoint=True))


class Player:
    """A synthesizer with the SoundFont loaded; every sound is brought to the same loudness first."""

    def __init__(self, path: str) -> None:
        import tinysoundfont

        self._synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
        self._font = self._synth.sfload(path)
        self._gains: dict[Sound, float] = {}

    def play(self, events: Sequence[Event], samples: int, rng: np.random.Generator) -> np.ndarray:
        """float32 [samples]: the events one after the other, in slots of equal length, each on its own channel."""
        for event in events:
            self._gain(event.sound)
        self._silence()
        changes: list[tuple[int, int, int, int]] = []  # (sample, channel, key, velocity); velocity 0 ends the note
        slot = samples // len(events)
        for channel, event in enumerate(events):
            self._select(channel, event.sound, self._gain(event.sound))
            for begin, end, key, velocity in score(event, channel * slot, slot, rng):
                changes += [(begin, channel, key, velocity), (end, channel, key, 0)]
        audio = self._perform(changes, samples)
        return audio / max(1.0, float(np.abs(audio).max()))

    def _perform(self, changes: list[tuple[int, int, int, int]], samples: int) -> np.ndarray:
        audio = np.zeros(samples, dtype=np.float32)
        now = 0
        for when, channel, key, velocity in sorted(changes, key=lambda change: (change[0], change[3])):
            audio[now:when] = self._generate(when - now)
            now = when
            if velocity:
                self._synth.noteon(channel, key, velocity)
            else:
                self._synth.noteoff(channel, key)
        audio[now:] = self._generate(samples - now)
        return audio

    def _gain(self, sound: Sound) -> float:
        """The factor that brings the loudest twentieth of a second of a full note to the reference level."""
        if sound not in self._gains:
            key = sound.number if sound.kind == "percussion" else KEYS[""][0]
            self._silence()
            self._select(0, sound, 1.0)
            audio = self._perform([(0, 0, key, 127), (SAMPLE_RATE // 2, 0, key, 0)], SAMPLE_RATE)
            power = (audio.reshape(20, -1) ** 2).mean(axis=1).max()
            self._gains[sound] = REFERENCE_RMS / float(np.sqrt(power))
        return self._gains[sound]

    def _select(self, channel: int, sound: Sound, gain: float) -> None:
        percussion = sound.kind == "percussion"
        self._synth.program_select(channel, self._font, 0, 0 if percussion else sound.number, percussion)
        self._synth.soundfonts[self._font].channel_set_volume(channel, gain)

    def _silence(self) -> None:
        self._synth.sounds_off()
        self._generate(FLUSH)

    def _generate(self, samples: int) -> np.ndarray:
        if not samples:
            return np.zeros(0, dtype=np.float32)
        stereo = np.frombuffer(self._synth.generate(samples), dtype=np.float32)
        return (stereo[::2] + stereo[1::2]) / 2


@functools.cache
def player() -> Player:
    """This process's player."""
    return Player(soundfont())


@functools.cache
def all_sounds() -> tuple[Sound, ...]:
    """The rows of general_midi.csv."""
    text = (importlib.resources.files(__package__) / "general_midi.csv").read_text(encoding="utf-8")
    return tuple(Sound(row["kind"], int(row["number"]), row["name"]) for row in csv.DictReader(text.splitlines()))


def soundfont() -> str:
    """Where the SoundFont lies.

    Raises:
        InputError: pretty_midi or tinysoundfont is not installed.
    """
    missing = [name for name in ("pretty_midi", "tinysoundfont") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} not installed: run `pip install 'ask-dist[corpora]'`")
    # Found by its spec: importing pretty_midi would cost a second in each process.
    spec = importlib.util.find_spec("pretty_midi")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "TimGM6mb.sf2")
