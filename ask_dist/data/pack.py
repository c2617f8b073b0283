"""Packing: clips, or a table of audio files and captions, into WebDataset shards (format: shards/README.md)."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ask_dist.data import audio
from ask_dist.data.shards import FORMAT, SIZES, Clip, write_text
from ask_dist.data.table import Row, read_table
from ask_dist.errors import InputError

KEY = re.compile(r"[A-Za-z0-9_-]+")
LONGEST_KEY = 80  # a tar name has room for 100 bytes, the extension included
ASIDE = ".packing"
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class EncodedClip:
    """A clip as its shard will hold it: the bytes of its FLAC and JSON members, and what sizes.json needs to know."""

    key: str
    flac: bytes
    description: bytes
    sample_rate: int
    seconds: float
    classes: tuple[str, ...]


def encode_clip(clip: Clip) -> EncodedClip:
    """Encode a clip as 16-bit FLAC and JSON; what lies outside -1..1 is clipped.

    Raises:
        BadSample: the audio is empty, silent, NaN or infinite.
        InputError: the key or the captions can't be stored.
    """
    if not KEY.fullmatch(clip.key) or len(clip.key) > LONGEST_KEY:
        raise InputError(f"key {clip.key!r}: use 1 to {LONGEST_KEY} of A-Z, a-z, 0-9, _ and -")
    if not clip.captions or not all(caption.strip() for caption in clip.captions):
        raise InputError(f"clip {clip.key!r} has captions {clip.captions!r}: give at least one, and none empty")
    audio.check(clip.audio)
    flac = io.BytesIO()
    soundfile.write(flac, np.clip(clip.audio, -1, 1), clip.sample_rate, format="FLAC", subtype="PCM_16")
    description = {**clip.extra, "captions": clip.captions, "classes": clip.classes}
    return EncodedClip(
        key=clip.key,
        flac=flac.getvalue(),
        description=json.dumps(description, ensure_ascii=False).encode(),
        sample_rate=clip.sample_rate,
        seconds=len(clip.audio) / clip.sample_rate,
        classes=clip.classes,
    )


def write_shards(
    clips: Iterable[Clip | EncodedClip], folder: Path, split: str, *, clips_per_shard: int = 250
) -> dict[str, Any]:
    """Write `<split>-000000.tar` and so on, then sizes.json, into `folder`; what was packed there before goes.

    The same clips give the same bytes. The shards are written aside and renamed, sizes.json last: a pack that is
    interrupted leaves the former one, or a folder without sizes.json, never half a shard that is listed.

    Returns:
        The content of sizes.json.

    Raises:
        BadSample, InputError: see encode_clip; also no clips, a key that occurs twice, or two sample rates.
    """
    folder = Path(folder)
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        sizes = _write_aside(clips, aside, split, clips_per_shard)
        (folder / SIZES).unlink(missing_ok=True)
        for old in folder.glob("*.tar"):
            old.unlink()
        for name in sizes["shards"]:
            os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside)
    write_text(folder / SIZES, json.dumps(sizes, indent=1, ensure_ascii=False) + "\n")
    return sizes


def _write_aside(clips: Iterable[Clip | EncodedClip], aside: Path, split: str, clips_per_shard: int) -> dict[str, Any]:
    from webdataset import TarWriter  # it imports torch: two seconds that reading a table should not cost

    encoded = (clip if isinstance(clip, EncodedClip) else encode_clip(clip) for clip in clips)
    shards: dict[str, dict[str, Any]] = {}
    classes: Counter[str] = Counter()
    keys: set[str] = set()
    rates: set[int] = set()
    while chunk := list(itertools.islice(encoded, clips_per_shard)):
        path = aside / f"{split}-{len(shards):06d}.tar"
        with path.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="ask-dist", group="ask-dist") as tar:
                for clip in chunk:
                    if clip.key in keys:
                        raise InputError(f"key {clip.key!r} occurs twice in {split}: a key must be unique")
                    keys.add(clip.key)
                    rates.add(clip.sample_rate)
                    classes.update(set(clip.classes))
                    tar.write({"__key__": clip.key, "flac": clip.flac, "json": clip.description})
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        seconds = round(sum(clip.seconds for clip in chunk), 3)
        shards[path.name] = {"clips": len(chunk), "seconds": seconds, "sha256": sha256}
    if not shards:
        raise InputError(f"no clips for the split {split!r}: give at least one")
    if len(rates) > 1:
        raise InputError(f"sample rates {sorted(rates)} in one split: resample all clips to one of them")
    return {"format": FORMAT, "sample_rate": rates.pop(), "shards": shards, "classes": dict(sorted(classes.items()))}


@dataclass(frozen=True)
class PackSummary:
    """What pack_table did.

    Attributes:
        clips: how many were packed.
        seconds: their length.
        shards: how many tar files.
        classes: clips of each class.
        skipped: a record {"line", "audio", "reason"} for each audio file that was left out; also in quarantine.jsonl.
    """

    clips: int
    seconds: float
    shards: int
    classes: dict[str, int]
    skipped: list[dict[str, Any]]


def pack_table(
    table: Path,
    audio_folder: Path,
    folder: Path,
    split: str,
    *,
    audio_column: str = "audio",
    caption_columns: Sequence[str] | None = None,
    sample_rate: int = 16000,
    clips_per_shard: int = 250,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Pack the clips that a table names (see read_table for its columns) into the shards of one split.

    Keys are made from the paths relative to `audio_folder`. An audio file that is missing, undecodable or silent, or
    has no caption, is skipped and named in `folder`/quarantine.jsonl.

    Args:
        table: CSV or JSONL, one audio file a row, or several rows with the same file and a caption each.
        audio_folder: what the paths in the table are relative to; none may lead out of it.
        folder: gets the shards and sizes.json.
        split: the first part of the shards' names.
        sample_rate: clips are resampled to it, in Hz.
        progress: called with audio files done and audio files in all.

    Raises:
        InputError: the table can't be used, a path leads out of `audio_folder`, or no clip is left.
    """
    if not audio_folder.is_dir():
        raise InputError(f"no audio folder {audio_folder}: correct the path")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise InputError(f"split {split!r}: use letters, digits, _ and - alone")
    rows = read_table(table, audio_column, caption_columns)
    paths = [_inside(audio_folder.resolve(), row, table) for row in rows]
    keys = make_keys([path.relative_to(audio_folder.resolve()).as_posix() for path in paths])
    skipped: list[dict[str, Any]] = []

    def clips() -> Iterator[EncodedClip]:
        for done, (row, path, key) in enumerate(zip(rows, paths, keys, strict=True), 1):
            try:
                yield encode_clip(_read(row, path, key, sample_rate))
            except audio.BadSample as error:
                skipped.append({"line": row.line, "audio": row.audio, "reason": str(error)})
            if progress:
                progress(done, len(rows))
        if len(skipped) == len(rows):
            raise InputError(f"all {len(rows)} audio files of {table} are bad, the first: {skipped[0]['reason']}")

    sizes = write_shards(clips(), folder, split, clips_per_shard=clips_per_shard)
    (folder / QUARANTINE).unlink(missing_ok=True)
    if skipped:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in skipped)
        write_text(folder / QUARANTINE, "".join(lines))
    shards = sizes["shards"].values()
    return PackSummary(
        clips=sum(shard["clips"] for shard in shards),
        seconds=sum(shard["seconds"] for shard in shards),
        shards=len(shards),
        classes=sizes["classes"],
        skipped=skipped,
    )


def make_keys(names: Sequence[str]) -> list[str]:
    """A valid, unique key for each relative path; a path gets the same one wherever it stands in the table."""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", name.rsplit(".", 1)[0]).strip("_") for name in names]
    shared = Counter(plain)
    return [
        key if key and len(key) <= LONGEST_KEY and shared[key] == 1 else f"{key[: LONGEST_KEY - 17]}-{_digest(name)}"
        for key, name in zip(plain, names, strict=True)
    ]


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def _inside(audio_folder: Path, row: Row, table: Path) -> Path:
    """The real path of a row's audio; links count as what they point to."""
    try:
        path = (audio_folder / row.audio).resolve()
        inside = path.is_relative_to(audio_folder)
    except (OSError, ValueError):  # too long a name, a null character, a loop of links
        inside = False
    if not inside:
        raise InputError(
            f"{table}, line {row.line}: {row.audio!r} leads out of {audio_folder}: keep the files inside it"
        )
    return path


def _read(row: Row, path: Path, key: str, sample_rate: int) -> Clip:
    if not row.audio:
        raise audio.BadSample("no path")
    if not row.captions:
        raise audio.BadSample("no caption")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise audio.BadSample(f"unreadable file: {error.strerror}") from None
    samples, rate = audio.decode(data)
    samples = audio.resample(samples, rate, sample_rate)
    return Clip(key, samples, sample_rate, tuple(row.captions), tuple(row.classes))
