"""Reading shards: raw clips in order, and a clip's audio and captions out of its bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ask_dist.data import audio
from ask_dist.data.audio import BadSample
from ask_dist.data.shards import KEY, LONGEST_CAPTION, LONGEST_KEY, ShardList
from ask_dist.data.tar import Member, members

SOUNDS = ("flac", "wav", "ogg", "mp3")
# What a member may weigh: larger ones are named and never read.
LARGEST = {"json": 1 << 20} | dict.fromkeys(SOUNDS, 1 << 28)
MAX_SECONDS = 600.0


def too_large(extension: str, size: int) -> str | None:
    """In words, that a member has more bytes than are read; else None."""
    limit = LARGEST[extension]
    return f"has {size} bytes, over the limit of {limit >> 20} MiB" if size > limit else None


@dataclass(frozen=True)
class Raw:
    """The undecoded members of one clip by extension; where the clip could not be read, `problem` says why instead."""

    shard: str
    key: str
    members: dict[str, bytes] = field(repr=False)
    problem: str | None = None

    @property
    def has_sound(self) -> bool:
        """Whether there is exactly one audio member."""
        return sum(name in self.members for name in SOUNDS) == 1

    @property
    def extension(self) -> str:
        """Of the audio member.

        Raises:
            BadSample: there is none, or more than one.
        """
        found = [name for name in SOUNDS if name in self.members]
        if len(found) != 1:
            raise BadSample(f"{'several sounds' if found else 'no sound'}: one .{', .'.join(SOUNDS)} is needed")
        return found[0]

    @property
    def sound(self) -> bytes:
        """The encoded audio; raises as `extension` does."""
        return self.members[self.extension]


def read_clips(shards: ShardList, shard: int, first: int, count: int, name: str | None = None) -> Iterator[Raw]:
    """Clips first..first+count of a listed shard, wherever it lies; else as `read_shard`."""
    name = name or shards.names[shard]
    try:
        with shards.at_hand(shard) as path:
            yield from read_shard(path, first, count, name)
    except BadSample as error:  # a shard that can't be had
        yield from itertools.repeat(Raw(name, "", {}, str(error)), count)


def read_shard(path: Path, first: int, count: int, name: str | None = None) -> Iterator[Raw]:
    """Clips first..first+count of a tar, always `count` of them: those that can't be read have a `problem`.

    A clip is a run of members with one key. Members that are neither a sound nor JSON are never opened. The clips'
    `shard` is `name`, by default that of the file.
    """
    name, there, done, reason = name or path.name, 0, 0, ""
    try:
        with path.open("rb") as stream:
            for there, (key, found, repeated) in enumerate(itertools.islice(_clips(stream), first + count), 1):
                if there > first:
                    yield _read(stream, name, key, found, repeated)
                    done += 1
    except OSError as error:
        reason = f": {error.strerror}"
    if done < count:
        problem = f"the shard has {there} clips that can be read, not all of those listed{reason}"
        yield from itertools.repeat(Raw(name, "", {}, problem), count - done)


def find_clip(path: Path, key: str) -> Raw | None:
    """The first clip of that key in a tar, or None; no other clip's members are read.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as stream:
        for name, found, _ in _clips(stream):
            if name == key:
                return _read(stream, path.name, key, found, repeated=False)
    return None


def read_heads(path: Path, size: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys of a tar's clips, all of their JSON and the first `size` bytes of their sounds, by extension: little of the
    file.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as stream:
        for key, found, _ in _clips(stream):
            heads = {}
            for extension, member in found:
                stream.seek(member.offset)
                heads[extension] = stream.read(min(LARGEST["json"] if extension == "json" else size, member.size))
            yield key, heads


def _clips(stream: BinaryIO) -> Iterator[tuple[str, list[tuple[str, Member]], bool]]:
    """Key, members with their extensions, and whether the key was in the shard before."""
    named = ((*_key_and_extension(member.name), member) for member in members(stream))
    seen: set[str] = set()
    for key, group in itertools.groupby((entry for entry in named if entry[1] in LARGEST), key=lambda entry: entry[0]):
        yield key, [(extension, member) for _, extension, member in group], key in seen
        seen.add(key)


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _read(stream: BinaryIO, shard: str, key: str, found: Sequence[tuple[str, Member]], repeated: bool) -> Raw:
    if not KEY.fullmatch(key):
        return Raw(shard, ascii(key)[1:101], {}, f"the key is not 1 to {LONGEST_KEY} of A-Z, a-z, 0-9, _ and -")
    contents: dict[str, bytes] = {}
    for extension, member in found:
        if repeated or extension in contents:
            return Raw(shard, key, {}, "the key occurs twice in the shard")
        if problem := too_large(extension, member.size):
            return Raw(shard, key, {}, f"its .{extension} {problem}")
        stream.seek(member.offset)
        contents[extension] = stream.read(member.size)
        if len(contents[extension]) < member.size:
            return Raw(shard, key, {}, f"the shard ends in its .{extension}")
    return Raw(shard, key, contents)


def open_clip(
    raw: Raw, sample_rate: int, max_seconds: float = MAX_SECONDS, room: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode a clip.

    Args:
        raw: the clip.
        sample_rate: in Hz; a sound at another rate is resampled.
        max_seconds: longer audio is bad.
        room: float32 [any], for `audio.decode`.

    Returns:
        float32 [samples] at `sample_rate`, and the JSON description, whose captions are a list of non-empty strings
        and whose classes, where it has some, a list of strings.

    Raises:
        BadSample: whatever keeps the clip from being used.
    """
    description = open_description(raw)
    samples, rate = audio.decode(raw.sound, max_seconds, room)
    return audio.resample(samples, rate, sample_rate), description


def open_description(raw: Raw) -> dict[str, Any]:
    """The description of a clip, as `open_clip` gives it; the sound must be there and is not decoded.

    Raises:
        BadSample: whatever keeps the clip from being used, but for what its sound holds.
    """
    if raw.problem:
        raise BadSample(raw.problem)
    if raw.extension and "json" not in raw.members:
        raise BadSample("no .json member")
    return describe(raw.members["json"])


def describe(data: bytes) -> dict[str, Any]:
    """The content of a clip's JSON, checked.

    Raises:
        BadSample: it can't be used; says why.
    """
    try:
        description = json.loads(data)
        captions, classes = description["captions"], description.get("classes", [])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample(f"unusable JSON: {type(error).__name__} {error}") from None
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise BadSample("no caption, or an empty one")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise BadSample("classes are not a list of names")
    longest = max(map(len, captions))
    if longest > LONGEST_CAPTION:
        raise BadSample(f"a caption of {longest} characters, over the limit of {LONGEST_CAPTION}")
    try:
        "".join((*captions, *classes)).encode()
    except UnicodeEncodeError:  # JSON can spell halves of a surrogate pair, which no tokenizer takes
        raise BadSample("a caption or class that is no Unicode text") from None
    return description
