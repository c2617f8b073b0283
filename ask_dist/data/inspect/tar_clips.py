"""The clips of a tar that nobody vouches for, with a word on everything in it that is not as it should be."""

from __future__ import annotations

import json
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ask_dist.data.pack import LONGEST_KEY
from ask_dist.data.pack_rows import EXTENSIONS

MEMBER = re.compile(rf"([A-Za-z0-9_-]{{1,{LONGEST_KEY}}})\.({'|'.join(sorted({*EXTENSIONS.values()}))}|json)")
# What tarfile lets out where a header is garbage.
BROKEN = (OSError, tarfile.TarError, EOFError, ValueError, IndexError, OverflowError, struct.error)


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
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                problem = _problem_of(member, size)
                if problem:
                    note(member.name, problem)
                    continue
                name, extension = member.name.split(".")
                if name != key:
                    yield from _whole(key, members, note)
                    key, members = name, {}
                    if name in seen:
                        note(name, "occurs twice")
                    seen.add(name)
                elif extension in members:
                    note(name, f"has two .{extension} members")
                content = tar.extractfile(member)
                members[extension] = content.read() if content else b""
        yield from _whole(key, members, note)
    except BROKEN as error:
        yield from _whole(key, members, note)
        note("", f"can't be read further than {key or 'its start'}: {type(error).__name__} {error}")


def _problem_of(member: tarfile.TarInfo, size: int) -> str | None:
    """What is wrong with a member of a tar of `size` bytes, in words, or None."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leads out of the folder"
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname}"
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "is not a plain file"
    if not MEMBER.fullmatch(member.name):
        return "is no member of a clip"
    if member.offset_data + member.size > size:
        return "is cut short"
    return None


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
        description = _description(members["json"])
        if isinstance(description, str):
            note(key, description)
        else:
            yield TarClip(key, sounds[0], members[sounds[0]], description)


def _description(content: bytes) -> dict[str, Any] | str:
    """The content of a .json member, or what is wrong with it."""
    try:
        description = json.loads(content)
    except (ValueError, RecursionError):
        return "its .json is not JSON"
    captions = description.get("captions") if isinstance(description, dict) else None
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        return "has no caption, or an empty one"
    return description
