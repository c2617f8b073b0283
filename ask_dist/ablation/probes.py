"""Fine-grained probes: is a clip nearer to its own caption than to one with a single attribute changed?"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ask_dist.data.corpora.sampled_scenes import CONNECTIVES, COUNTS, KEYS, VELOCITIES, Event, all_sounds

ATTRIBUTES = ("order", "count", "loudness", "pitch", "instrument")


@dataclass(frozen=True)
class Probe:
    """A caption of clip `clip` that is wrong in one attribute."""

    clip: int
    attribute: str
    caption: str


def probes(descriptions: Sequence[dict[str, Any]], seed: int) -> list[Probe]:
    """One probe for each attribute that a clip of the sampled scenes has; none for other corpora.

    The other value, and which event gets it, are drawn from the seed.

    Args:
        descriptions: the JSON of each clip: "captions" and "events" (class, count, loudness, pitch).
    """
    found = []
    for clip, description in enumerate(descriptions):
        events = [_event(event) for event in description.get("events", [])]
        if not events:
            continue
        rng = np.random.default_rng([seed, clip])
        for attribute, changed in _changes(events, rng):
            found.append(Probe(clip, attribute, _reworded(description["captions"][0], events, changed)))
    return found


def _changes(events: list[Event], rng: np.random.Generator) -> Iterator[tuple[str, list[Event]]]:
    if len(events) > 1:
        first = int(rng.integers(len(events) - 1))
        swapped = list(events)
        swapped[first], swapped[first + 1] = swapped[first + 1], swapped[first]
        yield "order", swapped
    at = int(rng.integers(len(events)))
    event = events[at]
    yield "count", _with(events, at, count=int(_other(range(1, len(COUNTS) + 1), event.count, rng)))
    yield "loudness", _with(events, at, loudness=str(_other(list(VELOCITIES), event.loudness, rng)))
    pitched = [place for place, other in enumerate(events) if other.sound.kind == "melodic"]
    if pitched:
        place = int(rng.choice(pitched))
        yield "pitch", _with(events, place, pitch=str(_other(list(KEYS), events[place].pitch, rng)))
    taken = {other.sound for other in events}
    same_kind = [sound for sound in all_sounds() if sound.kind == event.sound.kind and sound not in taken]
    yield "instrument", _with(events, at, sound=same_kind[int(rng.integers(len(same_kind)))])


def _with(events: list[Event], at: int, **changes: Any) -> list[Event]:
    return [Event(**(vars(event) | changes)) if place == at else event for place, event in enumerate(events)]


def _other(values: Sequence[Any], present: Any, rng: np.random.Generator) -> Any:
    others = [value for value in values if value != present]
    return others[int(rng.integers(len(others)))]


def _event(event: dict[str, Any]) -> Event:
    return Event(_sounds()[event["class"]], event["count"], event["loudness"], event["pitch"])


@functools.cache
def _sounds() -> dict[str, Any]:
    return {sound.name: sound for sound in all_sounds()}


def _reworded(caption: str, events: list[Event], changed: list[Event]) -> str:
    """The caption with other events between the same connectives."""
    rest, words = caption, ""
    for place, (event, other) in enumerate(zip(events, changed, strict=True)):
        rest = rest.removeprefix(event.words())
        words += other.words()
        if place + 1 < len(events):
            link = next(link for link in CONNECTIVES if rest.startswith(link))
            rest, words = rest.removeprefix(link), words + link
    return words
