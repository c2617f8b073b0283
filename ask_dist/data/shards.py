"""What lies on disk: clips, their ids, and the list of shards of a split with its sizes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ask_dist.errors import InputError
from ask_dist.files import write_atomically

FORMAT = 1
SIZES = "sizes.json"


@dataclass(frozen=True)
class Clip:
    """One clip with its captions, before it is packed.

    Attributes:
        key: name of the clip, matching ``[A-Za-z0-9_-]+``, unique in its corpus.
        audio: float32 [samples], mono, in -1..1.
        sample_rate: in Hz.
        captions: one or more sentences.
        classes: what sounds in the clip, for long-tail figures; may be empty.
        extra: anything else that JSON can hold; it must not use the names "captions" and "classes".
    """

    key: str
    audio: np.ndarray
    sample_rate: int
    captions: tuple[str, ...]
    classes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def stable_id(key: str) -> int:
    """The signed 64-bit id of a sample: the first 8 bytes of blake2b(key), little-endian."""
    return int.from_bytes(hashlib.blake2b(key.encode()).digest()[:8], "little", signed=True)


@dataclass(frozen=True)
class ShardList:
    """The shards of one split, of one folder or several, in a fixed order (folders as given, names sorted).

    Keys must be unique over all the folders: an id is made from the key alone.

    Attributes:
        paths: the tar files.
        counts: clips in each.
        seconds: total length of the audio.
        classes: how many clips each class is in.
        fingerprint: changes when any listed shard changes; a resumed run must see the same one.
    """

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    seconds: float
    classes: dict[str, int]
    fingerprint: str

    @classmethod
    def load(cls, folders: Path | str | Sequence[Path | str]) -> ShardList:
        """Read the sizes.json of each folder.

        Raises:
            InputError: a folder, its sizes.json or a listed shard is missing, nothing is listed, or the file is not
                in the format of shards/README.md.
        """
        paths: list[Path] = []
        counts: list[int] = []
        seconds = 0.0
        classes: Counter[str] = Counter()
        digest = hashlib.blake2b(digest_size=16)
        for folder in [folders] if isinstance(folders, str | Path) else folders:
            sizes = read_sizes(Path(folder))
            for name, shard in sorted(sizes["shards"].items()):
                path = Path(folder) / name
                if not path.is_file():
                    raise InputError(f"{path} is listed in {SIZES} but missing: restore it or pack the split again")
                paths.append(path)
                counts.append(shard["clips"])
                seconds += shard["seconds"]
                digest.update(f"{name} {shard['clips']} {shard['sha256']}\n".encode())
            classes.update(sizes["classes"])
        if not sum(counts):
            raise InputError(f"no clips in {folders}: pack at least one with `ask-dist pack`")
        return cls(tuple(paths), tuple(counts), seconds, dict(classes), digest.hexdigest())

    @property
    def names(self) -> tuple[str, ...]:
        """File names of the shards."""
        return tuple(path.name for path in self.paths)

    @property
    def clips(self) -> int:
        """How many clips there are in all."""
        return sum(self.counts)


def read_sizes(folder: Path) -> dict[str, Any]:
    """The checked content of a folder's sizes.json.

    Raises:
        InputError: the folder or the file is missing, or the file is not in the format of shards/README.md.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: build or pack the split, or correct the path")
    path = folder / SIZES
    if not path.is_file():
        raise InputError(f"no {SIZES} in {folder}: packing was interrupted or the path is wrong; pack again")
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): pack the split again") from None
    problem = _problem_of(sizes)
    if problem:
        raise InputError(f"{path}: {problem}; see shards/README.md or pack the split again")
    return sizes


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, meets the old file or the new one and nothing between."""
    write_atomically(path, text.encode())


def _problem_of(sizes: Any) -> str | None:
    """What is wrong with a sizes.json, in words, or None."""
    if not isinstance(sizes, dict) or sizes.get("format") != FORMAT:
        found = sizes.get("format") if isinstance(sizes, dict) else type(sizes).__name__
        return f"format is {found!r}, this version reads {FORMAT}"
    if not isinstance(sizes.get("sample_rate"), int) or sizes["sample_rate"] <= 0:
        return f"sample_rate is {sizes.get('sample_rate')!r}, not a positive number of Hz"
    if not isinstance(sizes.get("shards"), dict) or not sizes["shards"]:
        return "no shards are listed"
    for name, shard in sizes["shards"].items():
        if name != Path(name).name or not name.endswith(".tar"):
            return f"shard {name!r} is not the name of a tar file in the folder"
        if not isinstance(shard, dict) or not _is_count(shard.get("clips")):
            return f"shard {name!r} has no whole number of clips"
        if not isinstance(shard.get("seconds"), int | float) or not isinstance(shard.get("sha256"), str):
            return f"shard {name!r} lacks seconds or sha256"
    classes = sizes.get("classes")
    if not isinstance(classes, dict) or not all(_is_count(count) for count in classes.values()):
        return "classes is not an object of counts"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
