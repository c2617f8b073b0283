"""Keeping what is held out for testing away from training and from banks: by key, sound, recording; captions alone.

Sounds are the same if their samples or bytes are; with fingerprints also if they sound the same. The recording that a
clip was cut from is what its JSON says, so that another cut of it is known too.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ask_dist.data.audio import BadSample, decode
from ask_dist.data.fingerprints import Fingerprint, Fingerprints, fingerprint
from ask_dist.data.quarantine import Record
from ask_dist.data.samples import MAX_SECONDS, Raw, describe, read_clips, read_heads
from ask_dist.data.shards import ShardList, stable_id

LEAK = "held out"  # how the reason begins for which a clip was refused
FLAC_MAGIC, STREAM_MD5 = b"fLaC\x00", slice(26, 42)


@dataclass(frozen=True)
class HeldOut:
    """The clips of the splits that nothing may learn from.

    Attributes:
        keys: their keys, each with the name of its split.
        sounds: `sound_digest` of each, with split and key.
        recordings: `recording_of` each that names one, with split and key.
        captions: `words` of each of their captions, with split and key.
        fingerprints: of each that has one, by split and key; None: likeness is not looked for.
        unread: what can't be read, and so is held out from nothing, or by its key alone: a record a clip or shard.
        warnings: a line for each split that has some of these.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    sounds: Mapping[bytes, str] = field(default_factory=dict)
    recordings: Mapping[str, str] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Fingerprints | None = None
    unread: tuple[Record, ...] = ()
    warnings: tuple[str, ...] = ()
    # What clips were found to sound like, by `stable_id` of shard and key: later epochs need not look again.
    _likeness: dict[int, str | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, splits: Mapping[str, ShardList], *, fingerprints: bool = False, max_clip_seconds: float = MAX_SECONDS
    ) -> HeldOut:
        """Reads all shards of the splits but `train`; what can't be read is in `unread`.

        Args:
            splits: shards by the names of their splits.
            fingerprints: decode the sounds and take their fingerprints, which costs milliseconds a clip.
            max_clip_seconds: longer ones get none.
        """
        keys: dict[str, str] = {}
        sounds: dict[bytes, str] = {}
        recordings: dict[str, str] = {}
        captions: dict[str, str] = {}
        prints: list[tuple[str, Fingerprint]] = []
        unread: list[Record] = []
        warnings: list[str] = []
        for split, shards in splits.items():
            if split == "train":
                continue
            lost: Counter[tuple[str, str, str]] = Counter()
            for shard, count in enumerate(shards.counts):
                for raw in read_clips(shards, shard, 0, count, shards.labels[shard]):
                    if raw.problem:
                        lost[raw.shard, raw.key, raw.problem] += 1
                    if not raw.key:
                        continue
                    keys[raw.key], name = split, f"{split} as {raw.key}"
                    if raw.has_sound:
                        sounds[sound_digest(raw.sound)] = name
                    with suppress(BadSample, KeyError):
                        told = describe(raw.members["json"])
                        captions |= {words(caption): name for caption in told["captions"]}
                        recordings |= {recording_of(told): name}
                    if fingerprints:
                        with suppress(BadSample):
                            prints.append((name, fingerprint(*decode(raw.sound, max_clip_seconds))))
            unread += [_unread(split, *clip, clips) for clip, clips in lost.items()]
            warnings += [_warning(split, shards.clips, lost)] if lost else []
        found = Fingerprints(prints) if fingerprints else None
        recordings.pop("", None)
        return cls(keys, sounds, recordings, captions, found, tuple(unread), tuple(warnings))

    @property
    def digest(self) -> str:
        """Hexadecimal, of all that a sound is compared with; the same on every machine."""
        told = sorted((sound.hex(), name) for sound, name in self.sounds.items())
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def refuse(self, raw: Raw) -> None:
        """Raises BadSample for a clip that has the key, the sound or the recording of one that is held out."""
        if raw.key in self.keys:
            raise BadSample(f"{LEAK}: its key is in {self.keys[raw.key]}")
        if self.sounds and raw.has_sound:
            found = self.sounds.get(sound_digest(raw.sound))
            if found is not None:
                raise BadSample(f"{LEAK}: the same sound is in {found}")
        if self.recordings:
            recording = ""
            with suppress(BadSample, KeyError):  # such a clip is refused when it is opened
                recording = recording_of(describe(raw.members["json"]))
            if recording in self.recordings:
                raise BadSample(f"{LEAK}: its recording, {recording}, is in {self.recordings[recording]}")

    def refuse_likeness(self, raw: Raw, audio: np.ndarray, rate: int) -> None:
        """Raises BadSample for a clip that sounds like one that is held out, where fingerprints are compared.

        Args:
            raw: the clip.
            audio: float32 [samples], all of its sound.
            rate: in Hz.
        """
        if self.fingerprints is None:
            return
        clip = stable_id(f"{raw.shard} {raw.key}")
        if clip not in self._likeness:
            self._likeness[clip] = self.fingerprints.match(audio, rate)
        if self._likeness[clip] is not None:
            raise BadSample(f"{LEAK}: it sounds like {self._likeness[clip]}")

    def refuse_caption(self, caption: str) -> None:
        """Raises BadSample for a caption without audio that reads as one that is held out.

        Beside a sound of its own it is no leak: people say the same of many sounds, and training clips have it too.
        """
        if self.has_caption(caption):
            raise BadSample(f"{LEAK}: the same caption is in {self.captions[words(caption)]}")

    def has_caption(self, caption: str) -> bool:
        """Whether a caption reads as one that is held out."""
        return words(caption) in self.captions


def audit(shards: ShardList, held_out: HeldOut, chosen: Iterable[int] | None = None) -> list[Record]:
    """What training would meet of repeated keys and of clips that are held out, by the heads of the members.

    Sounds other than FLAC are compared by key and recording alone, fingerprints not at all. Shards that can't be read
    are left to the loader.

    Args:
        shards: the training split.
        held_out: what it must not have.
        chosen: numbers of the shards that are looked into; None: all.
    """
    met: set[int] = set()
    records: list[Record] = []
    labels = shards.labels
    for shard in range(len(labels)) if chosen is None else chosen:
        with suppress(OSError, BadSample), shards.at_hand(shard) as path:
            for key, heads in read_heads(path, STREAM_MD5.stop):
                reasons = ["the key is that of an earlier clip"] if stable_id(key) in met else []
                met.add(stable_id(key))
                compared = {name: head for name, head in heads.items() if name in ("flac", "json")}
                try:
                    held_out.refuse(Raw(labels[shard], key, compared))
                except BadSample as error:
                    reasons.append(str(error))
                records += [{"shard": labels[shard], "key": key, "reason": reason} for reason in reasons]
    return records


def _unread(split: str, shard: str, key: str, problem: str, clips: int) -> Record:
    what = f"this clip of {split} by more than its key" if key else f"{clips} clips of {split}"
    return {"shard": shard, "key": key, "reason": f"can't hold out {what}: {problem}"}


def _warning(split: str, clips: int, lost: Counter[tuple[str, str, str]]) -> str:
    shard, key, problem = next(iter(lost))
    return (
        f"{lost.total()} of {clips} clips of the {split} split can't be read and so not be held out of training and "
        f"banks, the first in {f'{shard} {key}'.rstrip()}: {problem}"
    )


def words(caption: str) -> str:
    """A caption's words: captions that differ in case, punctuation or spaces alone have the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold())) or caption


def recording_of(description: Mapping[str, Any]) -> str:
    """What a clip was cut from, by a clip's JSON: `youtube:ID` or the like, "" where it names none."""
    recording = description.get("recording")
    return recording if isinstance(recording, str) else ""


def sound_digest(data: bytes) -> bytes:
    """16 bytes that tell a sound from another: of FLAC the MD5 of its samples, which its header holds; else of `data`.

    So a FLAC that was compressed anew is recognised, and costs nothing; another format, rate or cut is not.
    """
    if data.startswith(FLAC_MAGIC) and any(data[STREAM_MD5]):
        return data[STREAM_MD5]
    return hashlib.blake2b(data, digest_size=16).digest()
