from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ask_dist.data.corpora import sampled_scenes
from ask_dist.data.corpora.sampled_scenes import Event, Scene, Sound, all_sounds, draw_scenes, render, swap, zipf
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError

FLUTE = Sound("melodic", 73, "flute")
CLAVES = Sound("percussion", 75, "claves")
SMALL: dict[str, Any] = {"seed": 5, "train": 20, "validation": 6, "test": 8, "swap_captions": 0.5, "seconds": 2.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tinysoundfont", reason="needs the extra ask-dist[corpora]")
    folder = tmp_path_factory.mktemp("scenes")
    sampled_scenes.build(folder, processes=1, **SMALL)
    return folder


def descriptions(folder: Path) -> list[dict[str, Any]]:
    shards = ShardList.load(folder)
    raws = (raw for path, count in zip(shards.paths, shards.counts, strict=True) for raw in read_shard(path, 0, count))
    return [open_clip(raw, 16000)[1] for raw in raws]


def audio_of(scene: Scene, seconds: float = 2.0) -> np.ndarray:
    return soundfile.read(io.BytesIO(render(scene, seconds).audio), dtype="float32")[0]


def scene_of(*events: Event, seed: int = 0) -> Scene:
    return Scene("k", seed, events, "words")


def rms(audio: np.ndarray) -> float:
    return float(np.sqrt((audio**2).mean()))


@pytest.mark.multiprocess
def test_a_build_has_the_splits_that_were_asked_for(corpus: Path) -> None:
    calls: list[Any] = []
    summary = sampled_scenes.build(corpus, progress=lambda *call: calls.append(call), **SMALL)
    assert calls == []  # the same parameters: nothing was built again
    assert summary.scenes == {"train": 20, "validation": 6, "test": 8}
    assert summary.seconds == pytest.approx(34 * 2)
    assert "GPL" in summary.licence
    assert "TimGM6mb" in summary.source
    for split, count in summary.scenes.items():
        met = descriptions(corpus / split)
        assert len(met) == count
        assert summary.classes >= len(ShardList.load(corpus / split).classes)
        for description in met:
            (caption,) = description["captions"]
            classes = [event["class"] for event in description["events"]]
            assert description["classes"] == classes
            assert description["swapped"] or all(name in caption for name in classes)


@pytest.mark.multiprocess
def test_seeds_are_unique_over_the_splits_and_half_the_training_captions_are_swapped(corpus: Path) -> None:
    splits = {split: descriptions(corpus / split) for split in ("train", "validation", "test")}
    seeds = [description["seed"] for split in splits.values() for description in split]
    assert len(set(seeds)) == 34
    assert {split: sum(d["swapped"] for d in met) for split, met in splits.items()} == {
        "train": 10,
        "validation": 0,
        "test": 0,
    }


@pytest.mark.multiprocess
def test_another_parameter_builds_again_and_the_same_ones_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    calls: list[Any] = []
    changed = {**SMALL, "swap_captions": 0.0}
    sampled_scenes.build(tmp_path, processes=2, progress=lambda *call: calls.append(call), **changed)
    assert calls[-1] == ("test", 8, 8)
    assert len(calls) == 34
    for split, same in (("train", False), ("validation", True), ("test", True)):
        first, second = (json.loads((folder / split / "sizes.json").read_text()) for folder in (corpus, tmp_path))
        assert (first == second) is same


def test_validation_and_test_have_no_two_scenes_with_the_same_events() -> None:
    for number, split in enumerate(("train", "validation", "test")):
        scenes = draw_scenes(split, number, 1000, 0)
        distinct = len({scene.events for scene in scenes})
        assert distinct == 1000 if split != "train" else distinct < 1000
        assert len({scene.caption for scene in scenes}) >= distinct
        assert len({scene.key for scene in scenes}) == len({scene.seed for scene in scenes}) == 1000


def test_classes_follow_a_zipf_law() -> None:
    sounds, weights = zipf(0)
    assert sorted(sounds, key=str) == sorted(all_sounds(), key=str)
    np.testing.assert_allclose(weights * np.arange(1, len(sounds) + 1), weights[0])
    assert zipf(0)[0] != zipf(1)[0]
    counts = Counter(event.sound for scene in draw_scenes("train", 0, 3000, 0) for event in scene.events)
    assert counts[sounds[0]] > 2 * counts[sounds[10]] > 4 * counts[sounds[100]] > 0


def test_captions_say_count_loudness_pitch_and_sound() -> None:
    assert Event(FLUTE, 2, "soft", "low").words() == "two soft low flute notes"
    assert Event(FLUTE, 1, "", "").words() == "one flute note"
    assert Event(CLAVES, 3, "loud", "").words() == "three loud claves sounds"
    names = [sound.name for sound in all_sounds()]
    assert len(names) == len(set(names)) == 160


def test_a_scene_sounds_the_same_whatever_was_rendered_before() -> None:
    pytest.importorskip("tinysoundfont", reason="needs the extra ask-dist[corpora]")
    first, *others = draw_scenes("train", 0, 12, 1)
    expected = render(first, 4.0)
    for other in others:
        render(other, 4.0)
        assert render(first, 4.0) == expected
    assert not np.array_equal(audio_of(first), audio_of(Scene(first.key, first.seed + 1, first.events, first.caption)))


@pytest.mark.parametrize("sound", [FLUTE, CLAVES, Sound("effect", 126, "applause")])
def test_loudness_and_order_can_be_heard(sound: Sound) -> None:
    pytest.importorskip("tinysoundfont", reason="needs the extra ask-dist[corpora]")
    levels = [rms(audio_of(scene_of(Event(sound, 2, loudness, "")))) for loudness in ("soft", "", "loud")]
    assert levels[0] * 1.5 < levels[1]
    assert levels[1] * 1.5 < levels[2]
    early = audio_of(scene_of(Event(sound, 1, "loud", ""), Event(FLUTE, 1, "soft", "low")))
    late = audio_of(scene_of(Event(FLUTE, 1, "soft", "low"), Event(sound, 1, "loud", "")))
    assert rms(early[:16000]) > 1.5 * rms(late[:16000])
    assert rms(late[16000:]) > 1.5 * rms(early[16000:])


def test_pitch_and_count_can_be_heard() -> None:
    pytest.importorskip("tinysoundfont", reason="needs the extra ask-dist[corpora]")
    peaks = []
    for pitch in ("low", "", "high"):
        spectrum = np.abs(np.fft.rfft(audio_of(scene_of(Event(FLUTE, 1, "", pitch)))))
        peaks.append(int(spectrum.argmax()))
    assert peaks[0] < peaks[1] < peaks[2]
    for count in (1, 2, 3, 4):
        envelope = np.abs(audio_of(scene_of(Event(CLAVES, count, "", "")))).reshape(-1, 800).max(axis=1)
        loud = envelope > envelope.max() / 3
        assert int(loud[0]) + int((loud[1:] & ~loud[:-1]).sum()) == count


def test_every_sound_can_be_heard_at_every_pitch() -> None:
    pytest.importorskip("tinysoundfont", reason="needs the extra ask-dist[corpora]")
    for sound in all_sounds():
        for pitch in ("low", "", "high") if sound.kind == "melodic" else ("",):
            audio = sampled_scenes.player().play([Event(sound, 1, "soft", pitch)], 16000, np.random.default_rng(0))
            assert 1e-3 < np.abs(audio).max() <= 1, (sound, pitch)


def test_swapped_captions_are_a_derangement_of_the_same_ones() -> None:
    scenes = draw_scenes("train", 0, 400, 0)
    swapped = swap(scenes, 0.3, 0)
    changed = [place for place, scene in enumerate(swapped) if scene.swapped]
    assert len(changed) == 120
    assert all(swapped[place].caption != scenes[place].caption for place in changed)
    assert sorted(scene.caption for scene in swapped) == sorted(scene.caption for scene in scenes)
    assert all(swapped[place] == scenes[place] for place in set(range(400)) - set(changed))
    assert swap(scenes, 0.3, 0) == swapped != swap(scenes, 0.3, 1)
    assert swap(scenes, 0.0, 0) == scenes
    with pytest.raises(InputError, match="too few differ"):
        swap(scenes[:3], 0.4, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 0}, "give at least 1"),
        ({"swap_captions": 1.5}, "give a share from 0 to 1"),
        ({"seconds": 1.0}, "need at least 2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_parameters_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampled_scenes.build(tmp_path, **{**SMALL, **changes})
    assert list(tmp_path.iterdir()) == []
