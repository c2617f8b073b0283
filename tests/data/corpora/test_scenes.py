"""Trimming, mixing and telling scenes."""

from __future__ import annotations

import numpy as np
import pytest

from ask_dist.data.corpora.scenes import BACKGROUND, LEVEL, PEAK, RATE, SceneMaker, Sound, caption, mix, prepare


def tone(seconds: float, hertz: float = 440) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def sounds(kinds: int = 12, each: int = 3, seconds: float = 0.5) -> list[Sound]:
    return [
        Sound(
            f"p/{kind}-{number}", tone(seconds, 200 + 50 * kind + number), f"noise {kind}-{number}", f"k{kind:02}", "L"
        )
        for kind in range(kinds)
        for number in range(each)
    ]


def maker(**changes: object) -> SceneMaker:
    arguments: dict = {"sounds": sounds(), "seed": [3, 0], "seconds": 5.0, "zipf": True, "distinct": False}
    return SceneMaker(**{**arguments, **changes})


def test_prepare_trims_silence_and_sets_the_loudness() -> None:
    quiet = np.concatenate([np.zeros(3000, np.float32), 0.01 * tone(1), np.zeros(5000, np.float32)])
    loud = prepare(quiet)
    assert loud.dtype == np.float32
    assert abs(len(loud) - RATE) <= 0.03 * RATE
    assert np.sqrt((loud**2).mean()) == pytest.approx(LEVEL, rel=0.05)


def test_prepare_keeps_a_click_below_full_scale_and_drops_what_nobody_hears() -> None:
    click = np.zeros(RATE, np.float32)
    click[500] = 1
    assert np.abs(prepare(click)).max() <= PEAK + 1e-6
    rumble = tone(2) * 0.1 + 0.8 + tone(2, 3)
    spectrum = np.abs(np.fft.rfft(prepare(rumble.astype(np.float32))[RATE // 2 :]))
    hertz = np.arange(len(spectrum)) / 1.5
    assert spectrum[hertz < 10].max() < 0.2 * spectrum.max()  # it was 10 times as loud


def test_events_do_not_overlap_and_lie_in_order() -> None:
    rng = np.random.default_rng(0)
    constant = [np.full(RATE, level, np.float32) for level in (0.1, 0.2, 0.4)]
    for _ in range(50):
        scene = mix(constant, None, 5 * RATE, rng)
        assert (scene.shape, scene.dtype) == ((5 * RATE,), np.float32)
        sounding = np.flatnonzero(scene)
        # Each fades in from nothing and out to nothing, so its own zeros are the first and the last sample.
        assert len(sounding) == 3 * (RATE - 2)
        middles = [scene[sounding[place * (RATE - 2) + RATE // 2]] for place in range(3)]
        assert all(abs(20 * np.log10(m / level)) <= 3.01 for m, level in zip(middles, (0.1, 0.2, 0.4), strict=True))


def test_long_events_are_cut_to_their_share_and_the_peak_is_held() -> None:
    scene = mix([tone(20) * 3, tone(20) * 3], tone(20), 4 * RATE, np.random.default_rng(0))
    assert scene.shape == (4 * RATE,)
    assert np.abs(scene).max() <= PEAK + 1e-6


def test_a_background_sounds_from_the_start_below_the_events() -> None:
    background, event = tone(5, 300), tone(0.5, 3000)
    scene = mix([event], background, 5 * RATE, np.random.default_rng(4))
    spectrum = np.abs(np.fft.rfft(scene[: RATE // 10]))
    assert 250 < np.argmax(spectrum) * 10 < 350


@pytest.mark.parametrize("count", [1, 2, 3])
def test_captions_name_everything_in_the_order_it_is_heard(count: int) -> None:
    rng = np.random.default_rng(0)
    events = ["a dog barking", "footsteps on gravel", "a cowbell"][:count]
    plain = {caption(events, None, rng) for _ in range(200)}
    assert len(plain) >= 4
    for sentence in plain:
        places = [sentence.index(event) for event in events]
        assert places == sorted(places) or (count == 2 and " after " in sentence)
        assert sentence == sentence.lower()
    behind = {caption(events, "rain", rng) for _ in range(200)}
    assert all("rain" in sentence and all(event in sentence for event in events) for sentence in behind)
    assert len(behind) >= len(BACKGROUND)


def test_a_scene_says_what_it_is_made_of() -> None:
    by_id = {sound.id: sound for sound in sounds()}
    for index in range(50):
        clip = maker().make(f"s-{index}", index)
        used = [by_id[id] for id in clip.extra["recordings"]]
        assert 1 <= len(used) <= 3
        assert clip.classes == tuple(sound.kind for sound in used)
        assert len(set(clip.classes)) == len(used)
        assert all(sound.phrase in clip.captions[0] for sound in used)
        assert clip.extra["licences"] == ["L"]
        assert clip.extra["templates"] is True
        assert (clip.sample_rate, clip.audio.shape) == (RATE, (5 * RATE,))


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    one, two = maker(), maker()
    two.make("x", 3)
    a, b = one.make("x", 7), two.make("x", 7)
    assert np.array_equal(a.audio, b.audio)
    assert (a.captions, a.extra) == (b.captions, b.extra)
    c = maker(seed=[4, 0]).make("x", 7)
    assert (a.captions, a.extra) != (c.captions, c.extra)


def test_long_sounds_are_sometimes_behind_the_others_and_short_ones_never() -> None:
    def behind(made: SceneMaker) -> int:
        return sum("background" in made.make("x", index).captions[0] for index in range(100))

    assert behind(maker()) == 0
    assert 10 < behind(maker(sounds=sounds(seconds=3.5))) < 90


def test_classes_follow_a_zipf_law_with_the_largest_first() -> None:
    many = [*sounds(12, 3), *(Sound(f"q/{n}", tone(0.5), f"big {n}", "largest", "L") for n in range(9))]
    zipf, flat = maker(sounds=many), maker(sounds=many, zipf=False)
    shares = {}
    for name, made in (("zipf", zipf), ("flat", flat)):
        kinds = [kind for index in range(400) for kind in made.make("x", index).classes]
        shares[name] = kinds.count("largest") / len(kinds)
    assert shares["zipf"] > 0.2 > 0.12 > shares["flat"]
    assert zipf.weights[0] / zipf.weights[9] == pytest.approx(10)


def test_distinct_scenes_tell_different_stories_while_there_are_any() -> None:
    few = sounds(5, 1)  # 5 + 5 * 4 + 5 * 4 * 3 = 85 stories
    made = maker(sounds=few, zipf=False, distinct=True)
    stories = [tuple(made.make("x", index).extra["recordings"]) for index in range(60)]
    assert len(set(stories)) == 60
    repeated = maker(sounds=few, zipf=False)
    assert len({tuple(repeated.make("x", index).extra["recordings"]) for index in range(60)}) < 60


def test_one_sound_alone_makes_scenes_too() -> None:
    made = maker(sounds=sounds(1, 1), distinct=True)
    assert {made.make("x", index).classes for index in range(3)} == {("k00",)}
