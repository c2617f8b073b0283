"""The clips of a tar that nobody vouches for, with a word on everything in it that is not as it should be."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ask_dist.data.audio import BadSample
from ask_dist.data.samples import LARGEST, describe, too_large
from ask_dist.data.shards import KEY
from ask_dist.data.tar import PLAIN, Member, all_members

MEMBER = re.compile(rf"{KEY.pattern}\.({'|'.join(LARGEST)})", re.IGNORECASE)


@dataclass(frozen=True)
class TarClip:
    """A clip with both members: the audio file's bytes and extension, and its checked description."""

    key: str
    extension: str
    audio: bytes = field(repr=False)
    description: dict[str, Any]


def clips_of(path: Path, note: Callable[[str, str], None]) -> Iterator[TarClip]:
    """The whole clips of a tar, in order. Nothing is unpacked to disk.

    Args:
        path: the tar.
        note: called with a key, or a member's name, and what is wrong with it; with "" where it is the tar itself.
    """
    seen: set[str] = set()
    key, members = "", dict[str, bytes]()
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            for member in all_members(stream):
                problem = _problem_of(member, size)
                if problem:
                    note(member.name, problem)
                    continue
                name, extension = member.name.split(".")
                extension = extension.lower()
                if name != key:
                    yield from _whole(key, members, note)
                    key, members = name, {}
                    if name in seen:
                        note(name, "occurs twice")
                    seen.add(name)
                elif extension in members:
                    note(name, f"has two .{extension} members")
                stream.seek(member.offset)
                members[extension] = stream.read(member.size)
        yield from _whole(key, members, note)
    except OSError as error:
        yield from _whole(key, members, note)
        note("", f"can't be read further than {key or 'its start'}: {error.strerror}")


def _problem_of(member: Member, size: int) -> str | None:
    """What is wrong with a member of a tar of `size` bytes, in words, or None."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leads out of the folder"
    if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        return f"is a link to {member.link}"
    if member.type not in PLAIN:
        return "is not a plain file"
    named = MEMBER.fullmatch(member.name)
    if named is None:
        return "is no member of a clip"
    if member.offset + member.size > size:
        return "is cut short"
    return too_large(named[1].lower(), member.size)


def _whole(key: str, members: dict[str, bytes], note: Callable[[str, str], None]) -> Iterator[TarClip]:
    """The clip, if it has audio and a description that says what it must."""
    if not key:
        return
    sounds = [extension for extension in members if extension != "json"]
    if len(sounds) != 1:
        note(key, f"has {len(sounds)} audio members")
    elif "json" not in members:
        note(key, "has no .json member")
    else:
        try:
            description = describe(members["json"])
        except BadSample as error:
            note(key, str(error))
        else:
            yield TarClip(key, sounds[0], members[sounds[0]], description)
