"""What a packing process does: read the audio of some rows, check it, encode it, write it into tars."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ask_dist.data import audio
from ask_dist.data.audio import BadSample
from ask_dist.data.pack import EncodedClip, ShardWriter, WrittenShard, describe, encode_clip
from ask_dist.data.processes import tick
from ask_dist.data.shards import LONGEST_CAPTION, Clip, write_text
from ask_dist.data.sources import OutOfReach, Source, reading
from ask_dist.data.table import URL, Row

MOST_FLAC_CHANNELS = 8
EXTENSIONS = {"FLAC": "flac", "OGG": "ogg", "MP3": "mp3", "WAV": "wav", "WAVEX": "wav"}
# Sizes from here on are written into pipes, where nobody can go back and fill in the true one: SoX's, the smallest.
STREAMED = 0x7FFFF000
DOWNLOADS = 8  # at once in a process
Sound = io.BytesIO | io.FileIO


@dataclass(frozen=True)
class PackSettings:
    """What is packed, and how.

    Attributes:
        split: the first part of the shards' names.
        original: whether an audio file is stored as it is, if it is FLAC, WAV, OGG or MP3; else as 16-bit FLAC.
        sample_rate: of the FLAC, in Hz; 0 keeps that of each file.
        keep_channels: whether the FLAC has the file's channels, 8 at most, instead of their mean.
        clips_per_shard: rows of the table a shard; what is skipped makes a shard smaller.
        shard_mib: a shard that has reached so much ends there, and another takes its rows' rest.
        max_seconds: longer audio is skipped.
        key_prefix: what all keys begin with.
    """

    split: str = "train"
    original: bool = False
    sample_rate: int = 16000
    keep_channels: bool = False
    clips_per_shard: int = 250
    shard_mib: int = 1024
    max_seconds: float = 600.0
    key_prefix: str = ""


@dataclass(frozen=True)
class Task:
    """Some rows of a table, with their checked paths or URLs and their keys, and where their shards go."""

    number: int
    rows: tuple[Row, ...]
    places: tuple[str, ...]
    keys: tuple[str, ...]
    aside: Path
    settings: PackSettings
    source: Source


def pack_rows(task: Task) -> tuple[int, dict[str, Any]]:
    """Write a task's tars into its folder, then a JSON file that says so.

    Returns:
        The task's number, and {"rows": how many there were, "shards": what there is of each WrittenShard, "skipped":
        the records of quarantine.jsonl, "lost": lines of the rows that were out of reach}.
    """
    tars = _Tars(task.aside, task.number, task.settings.shard_mib * 2**20)
    skipped: list[dict[str, Any]] = []
    lost: list[int] = []
    try:
        for row, key, read in _read(task):
            captions, reasons = usable_captions(row.captions)
            try:
                with read() as sound, reading():
                    if not captions:
                        raise BadSample(reasons.pop() if reasons else "no caption")
                    clip = _encode(row, key, captions, sound, task.settings)
                tars.add(clip)
            except BadSample as error:
                reasons.append(str(error))
                lost += [row.line] if isinstance(error, OutOfReach) else []
            skipped += ({"line": row.line, "audio": row.audio, "reason": reason} for reason in reasons)
            tick()
    finally:
        shards = tars.finish()
    written = [asdict(shard) for shard in shards]
    result = {"rows": len(task.rows), "shards": written, "skipped": skipped, "lost": lost}
    write_text(task.aside / f"{task.number:06d}.json", json.dumps(result))
    return task.number, result


class _Tars:
    """The tars of one task: a further one begins where one has reached `most` bytes."""

    def __init__(self, folder: Path, number: int, most: int) -> None:
        self._folder, self._number, self._most = folder, number, most
        self._writer: ShardWriter | None = None
        self._done: list[WrittenShard] = []

    def add(self, clip: EncodedClip) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self._folder / f"{self._number:06d}-{len(self._done):04d}.tar")
        self._writer.add(clip)
        if self._writer.size >= self._most:
            self.finish()

    def finish(self) -> list[WrittenShard]:
        if self._writer is not None:
            self._done.append(self._writer.finish())
            self._writer = None
        return self._done


def _read(task: Task) -> Iterator[tuple[Row, str, Callable[[], Sound]]]:
    """The rows with their keys and what gives their audio; of URLs, some more is being read already."""
    reads = [functools.partial(task.source.open, place) for place in task.places]
    if not any(map(URL.match, task.places)):
        yield from zip(task.rows, task.keys, reads, strict=True)
        return
    waiting: deque[tuple[Row, str, Callable[[], Sound]]] = deque()
    with ThreadPoolExecutor(DOWNLOADS) as executor:
        try:
            for row, key, read in zip(task.rows, task.keys, reads, strict=True):
                waiting.append((row, key, executor.submit(read).result))
                if len(waiting) > 2 * DOWNLOADS:
                    yield waiting.popleft()
            yield from waiting
        finally:
            executor.shutdown(cancel_futures=True)


def usable_captions(captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """The captions that can be stored, and for each of the others the reason why it can't."""
    good: list[str] = []
    reasons: list[str] = []
    for caption in captions:
        if len(caption) > LONGEST_CAPTION:
            reasons.append(f"a caption of {len(caption)} characters, at most {LONGEST_CAPTION} are taken")
        elif not _is_utf8(caption):
            reasons.append("a caption that is not UTF-8")
        else:
            good.append(caption)
    return good, reasons


def _is_utf8(text: str) -> bool:
    """Whether nothing in it was read from bytes that are not UTF-8 (see table.Row)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _encode(row: Row, key: str, captions: list[str], sound: Sound, settings: PackSettings) -> EncodedClip:
    """The clip of a row out of its audio file.

    Raises:
        BadSample: the audio can't be used.
    """
    _refuse_cut_wav(sound)
    sound.seek(0)
    decoded = audio.decode_channels(sound, settings.max_seconds)
    mono = audio.mono(decoded.samples)
    rate = settings.sample_rate or decoded.rate
    if settings.original or settings.keep_channels or rate != decoded.rate:  # else `encode_clip` looks at them
        audio.check(mono)
    classes = tuple(filter(_is_utf8, row.classes))
    if settings.original:
        if decoded.format not in EXTENSIONS:
            raise BadSample(f"{decoded.format} can't be stored as it is: pack it as FLAC")
        sound.seek(0)
        return EncodedClip(
            key,
            sound.read(),
            EXTENSIONS[decoded.format],
            describe(key, captions, classes, row.extra),
            decoded.rate,
            len(mono) / decoded.rate,
            classes,
        )
    samples = mono
    if settings.keep_channels:
        samples = decoded.samples.T
        if len(samples) > MOST_FLAC_CHANNELS:
            raise BadSample(f"{len(samples)} channels, FLAC has at most {MOST_FLAC_CHANNELS}")
    samples = audio.resample(samples, decoded.rate, rate)
    return encode_clip(Clip(key, samples.T, rate, tuple(captions), classes, row.extra))


def _refuse_cut_wav(sound: Sound) -> None:
    """Raises BadSample for a WAV that ends before its sound does, of which libsndfile would take what is there."""
    head = sound.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return
    length, place = sound.seek(0, io.SEEK_END), 12
    while place + 8 <= length:
        sound.seek(place)
        header = sound.read(8)
        if len(header) < 8:  # it has become shorter
            return
        name, size = struct.unpack("<4sI", header)
        place += 8
        if name == b"data":
            if length - place < size < STREAMED:
                raise BadSample(f"truncated WAV: {length - place} of {size} bytes of sound")
            return
        place += size + size % 2  # chunks begin at even places
