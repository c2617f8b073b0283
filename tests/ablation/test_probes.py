"""Captions that are wrong in one attribute, and right in all others."""

from __future__ import annotations

from typing import Any

import pytest

from ask_dist.ablation.probes import ATTRIBUTES, probes
from ask_dist.data.corpora.sampled_scenes import CONNECTIVES, COUNTS, KEYS, VELOCITIES, all_sounds, draw_scenes

CAPTION = "two soft low cello notes followed by three loud claves sounds"
EVENTS = [
    {"class": "cello", "count": 2, "loudness": "soft", "pitch": "low"},
    {"class": "claves", "count": 3, "loudness": "loud", "pitch": ""},
]


def described(caption: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    return {"captions": [caption], "events": events}


def parsed(caption: str) -> list[dict[str, Any]]:
    """A caption back into its events, by looking for their words."""
    for connective in CONNECTIVES[::-1]:
        caption = caption.replace(connective, "|")
    names = sorted((sound.name for sound in all_sounds()), key=len, reverse=True)
    found = []
    for part in caption.split("|"):
        words = part.rsplit(" ", 1)[0]
        name = next(name for name in names if words.endswith(f" {name}"))
        rest = words.removesuffix(name).split()
        loudness = next((word for word in rest if word in VELOCITIES), "")
        pitch = next((word for word in rest if word in KEYS), "")
        found.append({"class": name, "count": COUNTS.index(rest[0]) + 1, "loudness": loudness, "pitch": pitch})
    return found


def test_the_example_gets_one_probe_an_attribute():
    found = {probe.attribute: probe.caption for probe in probes([described(CAPTION, EVENTS)], seed=0)}
    assert tuple(found) == ATTRIBUTES
    assert found["order"] == "three loud claves sounds followed by two soft low cello notes"
    assert all(caption != CAPTION for caption in found.values())


def test_each_probe_of_many_scenes_changes_its_attribute_alone():
    descriptions = []
    for scene in draw_scenes("test", 2, 60, 0):
        events = [
            {"class": e.sound.name, "count": e.count, "loudness": e.loudness, "pitch": e.pitch} for e in scene.events
        ]
        descriptions.append(described(scene.caption, events))
    found = probes(descriptions, seed=1)
    assert {probe.attribute for probe in found} == set(ATTRIBUTES)
    for probe in found:
        events = descriptions[probe.clip]["events"]
        changed = parsed(probe.caption)
        assert changed != events
        if probe.attribute == "order":
            assert sorted(map(str, changed)) == sorted(map(str, events))
            continue
        key = {"instrument": "class"}.get(probe.attribute, probe.attribute)
        differing = {(place, name) for place, e in enumerate(events) for name in e if changed[place][name] != e[name]}
        assert len(differing) == 1
        assert {name for _, name in differing} == {key}


def test_the_same_seed_gives_the_same_probes():
    descriptions = [described(CAPTION, EVENTS)] * 4
    assert probes(descriptions, 3) == probes(descriptions, 3) != probes(descriptions, 4)


@pytest.mark.parametrize("description", [{"captions": ["rain"]}, {"captions": ["rain"], "events": []}])
def test_a_clip_without_events_has_none(description):
    assert probes([description], 0) == []
