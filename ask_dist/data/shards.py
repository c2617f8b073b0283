"""What lies on disk: clips, their ids, and the list of shards of a split with its sizes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ask_dist.data.audio import BadSample
from ask_dist.data.cache import LARGEST_SIZES, ShardCache, file_sha256
from ask_dist.data.places import expand, is_url
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

FORMAT = 1
SIZES = "sizes.json"
LONGEST_KEY = 80  # a tar name has room for 100 bytes, the extension included
KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")
LONGEST_CAPTION = 10_000  # characters


@dataclass(frozen=True)
class Clip:
    """One clip with its captions, before it is packed.

    Attributes:
        key: name of the clip, matching `KEY`, unique in its corpus.
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
    """The shards of one split, of one folder or several, in a fixed order (places as given, names sorted).

    Keys must be unique over all the folders: an id is made from the key alone.

    Attributes:
        paths: the tar files; of a shard behind a URL, its place in the cache, whether it is there yet or not.
        names: their names in their folders.
        counts: clips in each.
        sha256: of each, in hexadecimal.
        seconds: total length of the audio.
        classes: how many clips each class is in, by the folders' sizes.json.
        fingerprint: changes when any listed shard or weight changes; a resumed run must see the same one.
        folders: of each, a local path or a URL.
        weights: how often an epoch meets each clip of each shard; empty: once.
        cache: of the shards behind URLs.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...]
    sha256: tuple[str, ...]
    seconds: float
    classes: dict[str, int]
    fingerprint: str
    folders: tuple[str, ...]
    weights: tuple[float, ...] = ()
    cache: ShardCache = field(default_factory=ShardCache)

    @classmethod
    def load(
        cls,
        places: Path | str | Sequence[Path | str],
        weights: Sequence[float] | None = None,
        cache: ShardCache | None = None,
    ) -> ShardList:
        """Read the sizes.json of each folder; no shard is opened.

        Args:
            places: folders, URLs of folders, or patterns of either; see places.expand.
            weights: one a place; None: 1 each.
            cache: of shards behind URLs; None: the default one.

        Raises:
            InputError: a folder, its sizes.json or a listed shard is missing, nothing is listed, a shard is named
                twice, or the file is not in the format of shards/README.md.
        """
        given = [places] if isinstance(places, str | Path) else list(places)
        cache = cache or ShardCache()
        columns: list[tuple[Path, str, int, str, float, str]] = []
        seconds = 0.0
        classes: Counter[str] = Counter()
        content = hashlib.blake2b(digest_size=16)
        named_by: dict[str, Path | str] = {}
        for place, weight in zip(given, weights or [1.0] * len(given), strict=True):
            for folder, wanted in expand(place):
                sizes = read_sizes(folder, cache)
                real = folder if is_url(folder) else os.path.realpath(folder)
                for name in _chosen(folder, sizes["shards"], wanted):
                    _refuse_repeated(f"{real}/{name}", place, named_by)
                    shard = sizes["shards"][name]
                    path = cache.place(f"{folder}/{name}", shard["sha256"]) if is_url(folder) else Path(folder) / name
                    columns.append((path, name, shard["clips"], shard["sha256"], weight, folder))
                    seconds += shard["seconds"]
                    line = f"{name} {shard['clips']} {shard['sha256']}"
                    content.update(f"{line}\n".encode() if weight == 1 else f"{line} {weight}\n".encode())
                classes.update(sizes["classes"])
        if not sum(column[2] for column in columns):
            raise InputError(f"no clips in {', '.join(map(str, given))}: pack at least one with `ask-dist pack`")
        paths, names, counts, digests, each, folders = zip(*columns, strict=True)
        return cls(
            paths=paths,
            names=names,
            counts=counts,
            sha256=digests,
            seconds=seconds,
            classes=dict(classes),
            fingerprint=content.hexdigest(),
            weights=() if set(each) == {1.0} else each,
            folders=folders,
            cache=cache,
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names that tell the shards apart: with their folders, where there are several."""
        if len(set(self.folders)) < 2:
            return self.names
        return tuple(f"{folder}/{name}" for folder, name in zip(self.folders, self.names, strict=True))

    @property
    def clips(self) -> int:
        """How many clips there are in all."""
        return sum(self.counts)

    @contextmanager
    def at_hand(self, shard: int) -> Iterator[Path]:
        """A shard as a local file, fetched into the cache where it lies behind a URL.

        Raises:
            BadSample: it can't be fetched.
        """
        if not self._remote(shard):
            yield self.paths[shard]
            return
        with self.cache.opened(f"{self.folders[shard]}/{self.names[shard]}", self.sha256[shard]) as path:
            yield path

    def changed(self, shard: int) -> bool:
        """Whether a local shard is there but not with the content that its sizes.json lists. Reads all of it."""
        try:
            return not self._remote(shard) and file_sha256(self.paths[shard]) != self.sha256[shard]
        except OSError:
            return False

    @cached_property
    def remote(self) -> bool:
        """Whether some lie behind URLs."""
        return any(map(is_url, set(self.folders)))

    def _remote(self, shard: int) -> bool:
        return self.remote and is_url(self.folders[shard])


def _refuse_repeated(shard: str, place: Path | str, named_by: dict[str, Path | str]) -> None:
    """Notes which place names a shard; InputError where an earlier one did: all of its clips would come twice."""
    if shard in named_by:
        raise InputError(
            f"{shard} is named twice, by {named_by[shard]} and by {place}: name it once; data.weights repeats clips"
        )
    named_by[shard] = place


def _chosen(folder: str, listed: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The listed names, sorted; only those that match `wanted`, where there are patterns; all of them must exist."""
    patterns = [text for text in wanted if set("*?[") & set(text)]
    plain = set(wanted).difference(patterns)  # braces write out thousands of names: a look-up each, not a match
    names = sorted(
        name
        for name in listed
        if not wanted or name in plain or any(fnmatchcase(name, pattern) for pattern in patterns)
    )
    if not names:
        raise InputError(f"no shard of {folder} matches {', '.join(wanted)}: correct the pattern")
    if not is_url(folder):
        there = set(os.listdir(folder))  # one look, not one a shard
        for name in names:
            if name not in there:
                raise InputError(
                    f"{Path(folder) / name} is listed in {SIZES} but missing: restore it or pack the split again"
                )
    return names


def read_sizes(folder: Path | str, cache: ShardCache | None = None) -> dict[str, Any]:
    """The checked content of a folder's sizes.json.

    Raises:
        InputError: the folder or the file is missing, or the file is not in the format of shards/README.md.
    """
    path = f"{folder}/{SIZES}"
    data = _fetched_sizes(path, cache or ShardCache()) if is_url(folder) else _local_sizes(Path(folder))
    try:
        sizes = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): pack the split again") from None
    problem = _problem_of(sizes)
    if problem:
        raise InputError(f"{path}: {problem}; see shards/README.md or pack the split again")
    return sizes


def _local_sizes(folder: Path) -> bytes:
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: build or pack the split, or correct the path")
    path = folder / SIZES
    if not path.is_file():
        raise InputError(f"no {SIZES} in {folder}: packing was interrupted or the path is wrong; pack again")
    return path.read_bytes()


def _fetched_sizes(url: str, cache: ShardCache) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / SIZES
        try:
            cache.fetch(url, path, LARGEST_SIZES)
        except BadSample as error:
            raise InputError(f"{error}; correct the URL, or the access to it") from None
        return path.read_bytes()


def evenly(count: int, most: int) -> list[int]:
    """Of `count` shards at most `most`, spread evenly from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


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
        if "/" in name or "\0" in name or not name.endswith(".tar"):
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
