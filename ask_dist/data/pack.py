"""Clips into WebDataset shards (format: shards/README.md). For tables of clips see packing.py."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ask_dist.data import audio
from ask_dist.data.samples import too_large
from ask_dist.data.shards import FORMAT, KEY, LONGEST_CAPTION, LONGEST_KEY, SIZES, Clip, write_text
from ask_dist.errors import InputError

ASIDE = ".packing"
BUFFER = 2**20  # bytes that a tar is written by; tarfile takes 16 KiB


@dataclass(frozen=True)
class EncodedClip:
    """A clip as its shard will hold it: the bytes of its two members, and what sizes.json needs to know.

    Attributes:
        key: name of the clip.
        audio: the bytes of an audio file.
        extension: of the audio member: "flac", or the one of an original file.
        description: the bytes of the JSON member.
        sample_rate: in Hz.
        seconds: length of the audio.
        classes: what sounds in it.

    Raises:
        BadSample: a member is larger than readers take.
    """

    key: str
    audio: bytes
    extension: str
    description: bytes
    sample_rate: int
    seconds: float
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for extension, content in ((self.extension, self.audio), ("json", self.description)):
            if problem := too_large(extension, len(content)):
                raise audio.BadSample(f"its .{extension} {problem}")


def encode_clip(clip: Clip) -> EncodedClip:
    """Encode a clip as 16-bit FLAC and JSON; what lies outside -1..1 is clipped.

    Raises:
        BadSample: the audio is empty, silent, too loud, NaN or infinite, nothing that FLAC can hold, or
            a member would be larger than readers take.
        InputError: the key or the captions can't be stored.
    """
    samples = clip.audio if audio.check(clip.audio) <= 1 else np.clip(clip.audio, -1, 1)
    flac = io.BytesIO()
    try:
        soundfile.write(flac, samples, clip.sample_rate, format="FLAC", subtype="PCM_16")
    except soundfile.SoundFileError as error:
        raise audio.BadSample(f"can't be stored as FLAC: {error}") from None
    return EncodedClip(
        key=clip.key,
        audio=flac.getvalue(),
        extension="flac",
        description=describe(clip.key, clip.captions, clip.classes, clip.extra),
        sample_rate=clip.sample_rate,
        seconds=len(clip.audio) / clip.sample_rate,
        classes=clip.classes,
    )


def describe(key: str, captions: Sequence[str], classes: Sequence[str], extra: Mapping[str, Any]) -> bytes:
    """The JSON member of a clip.

    Raises:
        InputError: the key or the captions can't be stored.
    """
    if not KEY.fullmatch(key):
        raise InputError(f"key {key!r}: use 1 to {LONGEST_KEY} of A-Z, a-z, 0-9, _ and -")
    if not captions or not all(caption.strip() for caption in captions):
        raise InputError(f"clip {key!r} has captions {captions!r}: give at least one, and none empty")
    if (longest := max(map(len, captions))) > LONGEST_CAPTION:
        raise InputError(f"clip {key!r} has a caption of {longest} characters: give at most {LONGEST_CAPTION}")

    text = json.dumps({**extra, "captions": captions, "classes": classes}, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


@dataclass(frozen=True)
class WrittenShard:
    """A finished tar: its file name, what sizes.json says of it, and how many clips have each class and each rate."""

    file: str
    clips: int
    seconds: float
    sha256: str
    classes: dict[str, int]
    sample_rates: dict[str, int]


class ShardWriter:
    """Writes one tar; the same clips give the same bytes.

    Attributes:
        clips: how many were added.
        size: bytes of their members.
    """

    def __init__(self, path: Path) -> None:
        self.clips = 0
        self.size = 0
        self._path = path
        self._file = _Digested(path)
        self._tar = tarfile.TarFile(
            fileobj=self._file,  # type: ignore[arg-type]  # it writes and tells, which is all that is asked of it
            mode="w",
            format=tarfile.USTAR_FORMAT,
            copybufsize=BUFFER,
        )
        self._seconds = 0.0
        self._classes: Counter[str] = Counter()
        self._rates: Counter[str] = Counter()

    def add(self, clip: EncodedClip) -> None:
        """Append the clip's two members."""
        for extension, content in ((clip.extension, clip.audio), ("json", clip.description)):
            member = tarfile.TarInfo(f"{clip.key}.{extension}")
            member.size, member.mode = len(content), 0o444
            member.uname = member.gname = "ask-dist"
            self._tar.addfile(member, io.BytesIO(content))
            self.size += len(content)
        self.clips += 1
        self._seconds += clip.seconds
        self._classes.update(set(clip.classes))
        self._rates[str(clip.sample_rate)] += 1

    def finish(self) -> WrittenShard:
        """Close the tar; it is on disk when this returns."""
        self._tar.close()
        return WrittenShard(
            self._path.name,
            self.clips,
            round(self._seconds, 3),
            self._file.finish(),
            dict(self._classes),
            dict(self._rates),
        )

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()


class _Digested:
    """A file that is written from its start to its end, with its SHA-256; it goes to the disk as it grows, so that
    little is left to wait for at its end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._sent = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        if self.tell() - self._sent > BUFFER:
            self._file.flush()
            self._sent = self.tell()
            with suppress(OSError):  # begins to write, and does not wait; what is written leaves the cache
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def finish(self) -> str:
        """The digest in hexadecimal; the file is on disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def write_shards(
    clips: Iterable[Clip | EncodedClip], folder: Path, split: str, *, clips_per_shard: int = 250
) -> dict[str, Any]:
    """Write `<split>-000000.tar` and so on, then sizes.json, into `folder`; what was packed there before goes.

    The same clips give the same bytes. The shards are written aside and renamed, sizes.json last: a pack that is
    interrupted leaves the former one, or a folder without sizes.json, never half a shard that is listed.

    Returns:
        The content of sizes.json.

    Raises:
        BadSample, InputError: see encode_clip; also no clips, a key that occurs twice, two sample rates, or tars in
            the folder that are not of this split.
    """
    folder = Path(folder)
    refuse_others(folder, split)
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        shards = _write_aside(clips, aside, split, clips_per_shard)
        return publish(shards, aside, folder, split)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_aside(
    clips: Iterable[Clip | EncodedClip], aside: Path, split: str, clips_per_shard: int
) -> list[WrittenShard]:
    encoded = (clip if isinstance(clip, EncodedClip) else encode_clip(clip) for clip in clips)
    shards: list[WrittenShard] = []
    keys: set[str] = set()
    while chunk := list(itertools.islice(encoded, clips_per_shard)):
        writer = ShardWriter(aside / f"{len(shards):06d}.tar")
        try:
            for clip in chunk:
                if clip.key in keys:
                    raise InputError(f"key {clip.key!r} occurs twice in {split}: a key must be unique")
                keys.add(clip.key)
                writer.add(clip)
            shards.append(writer.finish())
        finally:
            writer.abandon()
    if not shards:
        raise InputError(f"no clips for the split {split!r}: give at least one")
    rates = sorted({int(rate) for shard in shards for rate in shard.sample_rates})
    if len(rates) > 1:
        raise InputError(f"sample rates {rates} in one split: resample all clips to one of them")
    return shards


def refuse_others(folder: Path, split: str) -> None:
    """Raises InputError where a folder holds tars that are not of this split: packing would take their place."""
    own = re.compile(rf"{re.escape(split)}-\d{{6}}\.tar")
    others = sorted(path.name for path in folder.glob("*.tar") if not own.fullmatch(path.name))
    if others:
        raise InputError(
            f"{folder} holds {len(others)} tars that are no shards of the split {split!r}, such as {others[0]}: "
            "pack into a folder of its own, or move them"
        )


def publish(
    shards: Sequence[WrittenShard],
    aside: Path,
    folder: Path,
    split: str,
    behind: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Move finished tars out of `aside` under their names, in the place of what `folder` held, and write sizes.json.

    Args:
        shards: in the order of their numbers; at least one.
        behind: the folder's sizes.json, if its shards stay and these come behind them.
        more: further entries of sizes.json.

    Returns:
        The content of sizes.json.
    """
    earlier: dict[str, Any] = behind["shards"] if behind else {}
    names = [f"{split}-{number:06d}.tar" for number in range(len(earlier), len(earlier) + len(shards))]
    classes: Counter[str] = Counter(behind["classes"] if behind else {})
    rates: Counter[str] = Counter(_rates(behind) if behind else {})
    for shard in shards:
        classes.update(shard.classes)
        rates.update(shard.sample_rates)
    sizes = {
        "format": FORMAT,
        "sample_rate": int(min(rates, key=lambda rate: (-rates[rate], int(rate)))),
        "shards": earlier
        | {
            name: {"clips": shard.clips, "seconds": shard.seconds, "sha256": shard.sha256}
            for name, shard in zip(names, shards, strict=True)
        },
        "classes": dict(sorted(classes.items())),
        **more,
    }
    if len(rates) > 1:
        sizes["sample_rates"] = dict(sorted(rates.items(), key=lambda item: int(item[0])))
    if not earlier:
        (folder / SIZES).unlink(missing_ok=True)
    for old in folder.glob("*.tar"):  # none of another split, or it would have been refused
        if old.name not in earlier:
            old.unlink()
    for name, shard in zip(names, shards, strict=True):
        os.replace(aside / shard.file, folder / name)
    write_text(folder / SIZES, json.dumps(sizes, indent=1, ensure_ascii=False) + "\n")
    return sizes


def _rates(sizes: Mapping[str, Any]) -> dict[str, int]:
    """How many clips have each sample rate, by a sizes.json."""
    clips = sum(shard["clips"] for shard in sizes["shards"].values())
    return sizes.get("sample_rates", {str(sizes["sample_rate"]): clips})
