"""Fingerprints: what is the same sound however it was stored, and what only resembles it."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.data.audio import decode, resample
from ask_dist.data.fingerprints import FRAME, HOP, RATE, Fingerprints, fingerprint
from ask_dist.data.samples import Raw, read_clips
from ask_dist.data.shards import ShardList

HZ = 16000
SOUNDS = 4
OPEN_SOUNDS, SAMPLED_SCENES = Path("shards/open_sounds"), Path("shards/sampled_scenes")


def seconds(length: float) -> np.ndarray:
    return np.arange(round(length * HZ)) / HZ


def struck(frequency: float, decay: float = 4.0) -> np.ndarray:
    """Half a second of a note with seven harmonics."""
    time = seconds(0.5)
    return sum(0.2 / h * np.exp(-time * decay) * np.sin(2 * np.pi * h * frequency * time) for h in range(1, 8))


def melody(rng: np.random.Generator, length: float = 4.0) -> np.ndarray:
    """Notes of one instrument on one grid, of pitches of its own."""
    notes = [struck(220 * 2 ** (rng.integers(24) / 12)) for _ in range(round(2 * length))]
    return np.concatenate(notes).astype(np.float32)


def bursts(rng: np.random.Generator, length: float = 4.0) -> np.ndarray:
    """Hits of one snare, each of other noise, on one grid."""
    time = seconds(0.5)
    hits = [0.3 * rng.standard_normal(len(time)) * np.exp(-15 * time) for _ in range(round(2 * length))]
    return np.concatenate(hits).astype(np.float32)


def noise(rng: np.random.Generator, length: float = 4.0) -> np.ndarray:
    return (0.1 * rng.standard_normal(round(length * HZ))).astype(np.float32)


def voiced(rng: np.random.Generator, length: float = 4.0) -> np.ndarray:
    """Four syllables a second: a buzz of one pitch through three resonances of their own."""
    time, pitch = seconds(0.25), rng.uniform(90, 200)
    syllables = []
    for _ in range(round(4 * length)):
        resonances = rng.uniform(300, 2500, 3)
        partials = np.arange(pitch, 4000, pitch)
        gains = sum(1 / (1 + ((partials - at) / 80) ** 2) for at in resonances)
        buzz = (gains[:, None] * np.sin(2 * np.pi * partials[:, None] * time)).sum(axis=0)
        syllables.append(buzz * np.hanning(len(time)))
    whole = np.concatenate(syllables)
    return (0.5 * whole / np.abs(whole).max()).astype(np.float32)


VARIED = {"melody": melody, "bursts": bursts, "noise": noise, "voiced": voiced}


@pytest.fixture(scope="module")
def sounds() -> dict[str, np.ndarray]:
    """Of each kind some, which differ as recordings of one class do."""
    return {f"{kind}-{n}": make(np.random.default_rng([1, n])) for kind, make in VARIED.items() for n in range(SOUNDS)}


@pytest.fixture(scope="module")
def held_out(sounds: dict[str, np.ndarray]) -> Fingerprints:
    return Fingerprints((name, fingerprint(audio, HZ)) for name, audio in sounds.items())


def stored(audio: np.ndarray, form: str, **options: float | str) -> tuple[np.ndarray, int]:
    """The sound out of a file of that format."""
    file = io.BytesIO()
    soundfile.write(file, audio, HZ, format=form, **options)
    return decode(file.getvalue())


def noisy(audio: np.ndarray, decibels: float) -> np.ndarray:
    rng = np.random.default_rng(5)
    return audio + np.float32(np.sqrt((audio**2).mean()) * 10 ** (-decibels / 20)) * rng.standard_normal(
        len(audio)
    ).astype(np.float32)


COPIES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, int]]] = {
    "as it is": lambda audio: (audio, HZ),
    "OGG": lambda audio: stored(audio, "OGG", subtype="VORBIS", compression_level=0.9),
    "MP3": lambda audio: stored(audio, "MP3", compression_level=0.9),
    "8 kHz": lambda audio: (resample(audio, HZ, 8000), 8000),
    "44.1 kHz": lambda audio: (resample(audio, HZ, 44100), 44100),
    "a rate without a short ratio": lambda audio: (resample(audio, HZ, 15991), 15991),
    "quiet": lambda audio: (0.003 * audio, HZ),
    "loud and clipped": lambda audio: (np.clip(2 / np.abs(audio).max() * audio, -1, 1), HZ),
    "upside down": lambda audio: (-audio, HZ),
    "noise at 20 dB": lambda audio: (noisy(audio, 20), HZ),
    "shifted": lambda audio: (audio[1237:], HZ),
    "later": lambda audio: (np.concatenate([np.zeros(7321, np.float32), audio]), HZ),
    "its middle": lambda audio: (audio[len(audio) // 4 : -len(audio) // 4], HZ),
    "in a longer one": lambda audio: (np.concatenate([noise(np.random.default_rng(7)), audio, audio[::-1]]), HZ),
    "another section": lambda audio: (np.concatenate([audio[len(audio) // 3 :], audio[: len(audio) // 3]]), HZ),
    "all of it": lambda audio: stored(resample(0.4 * audio[999:], HZ, HZ), "OGG", compression_level=0.9),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_recognised(sounds: dict[str, np.ndarray], held_out: Fingerprints, copy: str) -> None:
    found = {name: held_out.match(*COPIES[copy](audio)) for name, audio in sounds.items()}
    missed = {name for name, other in found.items() if other is None}
    assert all(other == name for name, other in found.items() if name not in missed)
    assert len(missed) <= (1 if copy == "noise at 20 dB" else 0)


@pytest.mark.parametrize(("length", "least"), [(1.0, 3), (2.0, 5), (10.0, 6)])
@pytest.mark.parametrize("kind", VARIED)
def test_so_are_short_and_long_clips(kind: str, length: float, least: int) -> None:
    rng = np.random.default_rng(11)
    clips = {str(number): VARIED[kind](rng, length) for number in range(6)}
    known = Fingerprints((name, fingerprint(audio, HZ)) for name, audio in clips.items())
    found = {name: known.match(*stored(0.5 * audio[333:], "OGG")) for name, audio in clips.items()}
    assert sum(name == other for name, other in found.items()) >= least
    assert set(found.values()) <= {*clips, None}
    assert [known.match(VARIED[kind](rng, length), HZ) for _ in range(6)] == [None] * 6


@pytest.mark.parametrize("kind", VARIED)
def test_others_of_its_class_are_not(held_out: Fingerprints, kind: str) -> None:
    others = (VARIED[kind](np.random.default_rng([2, number])) for number in range(25))
    assert [held_out.match(audio, HZ) for audio in others] == [None] * 25


def scene(events: list[np.ndarray], places: list[float]) -> np.ndarray:
    """Four seconds with the events at these seconds."""
    whole = np.zeros(4 * HZ, np.float32)
    for event, place in zip(events, places, strict=True):
        start = round(place * HZ)
        whole[start : start + len(event)] += event[: len(whole) - start].astype(np.float32)
    return whole


def test_other_scenes_of_the_same_instruments_are_not() -> None:
    rng = np.random.default_rng(3)
    notes = [struck(f) for f in (262, 330, 392, 523)]
    hits = [bursts(rng, 0.5) for _ in range(4)]
    drawn = [
        scene([(notes + hits)[n] for n in rng.permutation(8)[:5]], sorted(rng.uniform(0, 3.4, 5))) for _ in range(40)
    ]
    known = Fingerprints((str(number), fingerprint(audio, HZ)) for number, audio in enumerate(drawn[:20]))
    assert [known.match(audio, HZ) for audio in drawn[20:]] == [None] * 20
    assert [known.match(*stored(audio, "MP3")) for audio in drawn[:20]] == [str(number) for number in range(20)]


def steady() -> Iterator[np.ndarray]:
    """Sounds that fingerprints have little or nothing of."""
    time, rng = seconds(4), np.random.default_rng(4)
    yield np.zeros(4 * HZ)
    yield np.full(4 * HZ, 0.5)
    for frequency in (150, 300, 440, 441, 880, 1900, 3000):
        yield 0.3 * np.sin(2 * np.pi * frequency * time)
        yield 0.3 * np.sin(2 * np.pi * frequency * time) * (1 + 0.5 * np.sin(2 * np.pi * 4 * time))
    for period in (4000, 4100, 8000):
        yield np.where(np.arange(4 * HZ) % period == 0, 0.9, 0.0)
    yield 0.3 * np.sin(2 * np.pi * (200 + 100 * time) * time)
    yield 1e-4 * rng.integers(-1, 2, 4 * HZ)
    yield 0.3 * np.sin(2 * np.pi * 60 * time) + 0.001 * rng.standard_normal(4 * HZ)


def test_silence_tones_and_clicks_are_like_nothing_else(held_out: Fingerprints) -> None:
    flat = [audio.astype(np.float32) for audio in steady()]
    known = Fingerprints((str(number), fingerprint(audio, HZ)) for number, audio in enumerate(flat))
    for number, audio in enumerate(flat):
        assert held_out.match(audio, HZ) is None
        assert known.match(audio, HZ) in (None, str(number))
    for kind, make in VARIED.items():
        assert known.match(make(np.random.default_rng(6)), HZ) is None, kind


@pytest.mark.parametrize("length", [0, 1, FRAME - 1, FRAME, FRAME + HOP, FRAME + 9 * HOP])
def test_the_shortest_are_like_nothing(length: int) -> None:
    audio = noise(np.random.default_rng(8))[:length]
    short = fingerprint(audio, RATE)
    assert len(short) == max(0, (length - FRAME) // HOP)
    known = Fingerprints([("short", short)])
    assert known.match(audio, RATE) is None
    assert Fingerprints([]).match(audio, RATE) is None


def test_a_fingerprint_is_that_of_the_equation() -> None:
    audio = voiced(np.random.default_rng(9), 2.0)
    found, at_rate = fingerprint(audio, HZ), resample(audio, HZ, RATE).astype(np.float64)
    edges = np.geomspace(300, 2000, 34)
    bins = np.arange(FRAME // 2 + 1) * RATE / FRAME
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)

    def shape(frame: int) -> np.ndarray:
        power = np.abs(np.fft.rfft(window * at_rate[frame * HOP : frame * HOP + FRAME])) ** 2
        bands = [power[(bins >= low) & (bins < high)].mean() for low, high in itertools.pairwise(edges)]
        return np.array(bands) / sum(bands)

    known = np.bitwise_count(found.known)
    for frame in np.flatnonzero(known > 16)[::20] + 1:
        before, now = shape(frame - 1), shape(frame)
        signs = (now[:-1] - now[1:]) - (before[:-1] - before[1:]) > 0
        places = [bit for bit in range(32) if found.known[frame - 1] >> bit & 1]
        assert [bool(found.bits[frame - 1] >> bit & 1) for bit in places] == signs[places].tolist()


def test_all_blocks_of_a_long_sound_are_those_of_its_parts() -> None:
    audio = np.tile(voiced(np.random.default_rng(10)), 9)  # 36 s, more than one block
    long = fingerprint(audio, HZ)
    first = fingerprint(audio[: 8 * HZ], HZ)
    assert len(long) == (9 * 4 * RATE - FRAME) // HOP
    assert (long.bits[: len(first)] == first.bits).mean() > 0.99


def test_what_one_process_finds_another_does(held_out: Fingerprints, sounds: dict[str, np.ndarray]) -> None:
    sent = pickle.loads(pickle.dumps(held_out))  # as to decoding processes
    for name, audio in sounds.items():
        assert sent.match(audio[500:], HZ) == held_out.match(audio[500:], HZ) == name


@pytest.fixture(scope="module")
def tested() -> tuple[dict[str, tuple[np.ndarray, int]], dict[str, set[str]], Fingerprints]:
    """The test scenes of real recordings, what each is composed of, and their fingerprints."""
    if not (OPEN_SOUNDS / "test").is_dir():
        pytest.skip("needs `ask-dist corpus build open-sounds`")
    scenes, recordings = {}, {}
    for raw in clips_of(OPEN_SOUNDS / "test"):
        scenes[raw.key] = decode(raw.sound)
        recordings[raw.key] = set(json.loads(raw.members["json"])["recordings"])
    return scenes, recordings, Fingerprints((key, fingerprint(*scene)) for key, scene in scenes.items())


def clips_of(split: Path) -> Iterator[Raw]:
    shards = ShardList.load(split)
    for shard, count in enumerate(shards.counts):
        yield from read_clips(shards, shard, 0, count)


REAL = ("as it is", "OGG", "MP3", "8 kHz", "loud and clipped", "noise at 20 dB", "its middle")


@pytest.mark.slow
@pytest.mark.parametrize("copy", REAL)
def test_scenes_of_real_recordings_are_recognised(tested, copy: str) -> None:
    """Of 200, each begun up to a quarter of a second later and at 0.4 of its level; prints how many (`pytest -rP`)."""
    scenes, recordings, known = tested
    rng = np.random.default_rng(12)
    right = alike = 0
    for key in rng.permutation(sorted(scenes))[:200]:
        audio, rate = scenes[key]
        assert rate == HZ
        found = known.match(*COPIES[copy](0.4 * audio[int(rng.integers(HZ // 4)) :]))
        right += found == key
        alike += found is not None and found != key and bool(recordings[found] & recordings[key])
    print(f"{copy}: {right} of 200 as themselves, {alike} as another scene with the same recording")
    assert right + alike >= (140 if copy == "its middle" else 170)


@pytest.mark.slow
def test_scenes_of_other_recordings_are_not(tested) -> None:
    """Of the 2,400 training scenes, which share no recording with these; prints the recordings of those that match."""
    _, recordings, known = tested
    pairs = []
    for raw in clips_of(OPEN_SOUNDS / "train"):
        found = known.match(*decode(raw.sound))
        if found is not None:
            own = json.loads(raw.members["json"])["recordings"]
            pairs.append((raw.key, found, own, sorted(recordings[found])))
    print(f"{len(pairs)} match:", *pairs, sep="\n")
    assert len(pairs) <= 24


@pytest.mark.slow
def test_scenes_of_the_same_samples_are_alike_where_these_are_most_of_them() -> None:
    """Of 600 training scenes whose instruments are those of the test scenes; prints how many match."""
    if not (SAMPLED_SCENES / "test").is_dir():
        pytest.skip("needs `ask-dist corpus build sampled-scenes`")
    known = Fingerprints((raw.key, fingerprint(*decode(raw.sound))) for raw in clips_of(SAMPLED_SCENES / "test"))
    train = itertools.islice(clips_of(SAMPLED_SCENES / "train"), 600)
    matches = sum(known.match(*decode(raw.sound)) is not None for raw in train)
    print(f"{matches} of 600 match")
    assert matches <= 150
