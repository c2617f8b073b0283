"""Packing a table of clips into shards: by many processes, and on from where an earlier call stopped."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ask_dist.data.pack import ASIDE, WrittenShard, publish, refuse_others
from ask_dist.data.pack_rows import PackSettings, Task, pack_rows
from ask_dist.data.processes import in_processes
from ask_dist.data.shards import LONGEST_KEY, SIZES, read_sizes, write_text
from ask_dist.data.sources import Source, check_url
from ask_dist.data.table import URL, Row
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

QUARANTINE = "quarantine.jsonl"
PLAN = "plan.json"
VERSION = 2  # of what packing writes; another one takes up nothing of this


@dataclass(frozen=True)
class PackSummary:
    """What pack_table did.

    Attributes:
        clips: how many there are now.
        seconds: their length.
        shards: how many tar files.
        classes: clips of each class.
        skipped: a record {"line", "audio", "reason"} for each audio file, or caption, that was left out; also in
            quarantine.jsonl.
        kept: how many of the table's audio files an earlier call had packed, or looked at, already.
    """

    clips: int
    seconds: float
    shards: int
    classes: dict[str, int]
    skipped: list[dict[str, Any]]
    kept: int


def pack_table(
    rows: Sequence[Row],
    source: Source,
    folder: Path,
    settings: PackSettings,
    *,
    name: str = "the table",
    processes: int | None = None,
    again: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Pack the clips that a table names into the shards of one split.

    Keys are made from paths and URLs. An audio file that is missing, undecodable, silent, too long or too large, or
    has no caption, is skipped and named in `folder`/quarantine.jsonl; so is a caption that can't be stored. Order and
    bytes follow from the arguments alone, whatever the number of processes.

    What a call has finished when it is interrupted, by SIGKILL too, the next call with the same rows and settings
    keeps. Until the last shard is written, what was packed in `folder` before stays.

    Args:
        rows: one an audio file; see table.py and tables/.
        source: reads their audio; no path may lead out of its folder.
        folder: gets the shards and sizes.json.
        settings: see there.
        name: the table's, for messages.
        processes: that decode and encode; None: one a core.
        again: pack anew what an earlier call has packed.
        progress: called with audio files done and audio files in all.

    Raises:
        InputError: a path leads out of the source's folder, a URL is of a kind that is not read, no clip is left, or
            the folder holds tars of another split.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", settings.split):
        raise InputError(f"split {settings.split!r}: use letters, digits, _ and - alone")
    if not re.fullmatch(r"[A-Za-z0-9_-]{0,20}", settings.key_prefix):
        raise InputError(f"key prefix {settings.key_prefix!r}: use up to 20 letters, digits, _ and - alone")
    refuse_others(folder, settings.split)
    if not rows:
        raise InputError(f"{name} has no rows: give at least one audio file with a caption")
    rows, names, refused = _wanted(rows, source, name)
    digest = _digest(rows, names, source, settings)
    if not again and (summary := _packed_before(folder, digest, len(rows))):
        return summary
    aside = folder / ASIDE
    results = _take_up(aside, digest, again)
    kept = sum(result["rows"] for result in results.values())
    tasks = (task for task in _tasks(rows, names, aside, settings, source) if task.number not in results)
    report = None if progress is None else (lambda done: progress(kept + done, len(rows)))
    for number, result in in_processes(pack_rows, tasks, processes, report):
        results[number] = result
    results[-1] = {"shards": [], "skipped": refused}
    return _publish(results, aside, folder, settings.split, digest, name, kept)


def _wanted(rows: Sequence[Row], source: Source, table: str) -> tuple[list[Row], list[str], list[dict[str, Any]]]:
    """The rows that are to be packed, their URLs or checked paths, and a record for each of the others."""
    audio_folder = source.folder.resolve()
    first: dict[str, Row] = {}
    refused: list[dict[str, Any]] = []
    for row in rows:
        name = "" if row.refused else _checked(audio_folder, row, table)
        reason = row.refused or (f"the same file as line {first[name].line}" if name in first else "")
        if reason:
            refused.append({"line": row.line, "audio": row.audio, "reason": reason})
        else:
            first[name] = row
    return list(first.values()), list(first), refused


def _tasks(
    rows: Sequence[Row], names: Sequence[str], aside: Path, settings: PackSettings, source: Source
) -> Iterator[Task]:
    """The rows in runs of `clips_per_shard`."""
    named = [
        f"{row.name}{PurePosixPath(name).suffix}" if row.name else name for row, name in zip(rows, names, strict=True)
    ]
    keys = make_keys(named, settings.key_prefix)
    for number, first in enumerate(range(0, len(rows), settings.clips_per_shard)):
        run = slice(first, first + settings.clips_per_shard)
        yield Task(number, tuple(rows[run]), tuple(names[run]), tuple(keys[run]), aside, settings, source)


def _publish(
    results: dict[int, dict[str, Any]], aside: Path, folder: Path, split: str, digest: str, name: str, kept: int
) -> PackSummary:
    """Put together what the tasks did, once all are through."""
    shards = [WrittenShard(**shard) for _, result in sorted(results.items()) for shard in result["shards"]]
    skipped = sorted((record for result in results.values() for record in result["skipped"]), key=lambda r: r["line"])
    if not shards:
        shutil.rmtree(aside)
        raise InputError(f"all {len(skipped)} audio files of {name} are bad, the first: {skipped[0]['reason']}")
    (folder / SIZES).unlink(missing_ok=True)  # publish does so too; the old one must not stand beside a new quarantine
    (folder / QUARANTINE).unlink(missing_ok=True)
    if skipped:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in skipped)
        write_atomically(folder / QUARANTINE, lines.encode(errors="backslashreplace"))
    sizes = publish(shards, aside, folder, split, packed_from=digest)
    shutil.rmtree(aside)
    return _summary(sizes, skipped, kept)


def _summary(sizes: dict[str, Any], skipped: list[dict[str, Any]], kept: int) -> PackSummary:
    shards = sizes["shards"].values()
    clips, seconds = (sum(shard[what] for shard in shards) for what in ("clips", "seconds"))
    return PackSummary(clips, seconds, len(shards), sizes["classes"], skipped, kept)


def _packed_before(folder: Path, digest: str, rows: int) -> PackSummary | None:
    """What a finished call with the same rows and settings left, if it is still there."""
    if not (folder / SIZES).is_file():
        return None
    try:
        sizes = read_sizes(folder)
    except InputError:
        return None
    if sizes.get("packed_from") != digest or not all((folder / name).is_file() for name in sizes["shards"]):
        return None
    return _summary(sizes, list(read_quarantine(folder)), kept=rows)


def _take_up(aside: Path, digest: str, again: bool) -> dict[int, dict[str, Any]]:
    """What the tasks of an earlier call with the same digest have finished, by number; anything else is removed."""
    plan = {"version": VERSION, "digest": digest}
    results: dict[int, dict[str, Any]] = {}
    if again or _json(aside / PLAN) != plan:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_text(aside / PLAN, json.dumps(plan))
    for path in aside.glob("[0-9]*.json"):
        result = _json(path)
        if result and all((aside / shard["file"]).is_file() for shard in result["shards"]):
            results[int(path.stem)] = result
    return results


def _json(path: Path) -> Any:
    """The content of one of packing's own files, None where it is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _digest(rows: Sequence[Row], names: Sequence[str], source: Source, settings: PackSettings) -> str:
    given = [VERSION, asdict(settings), str(source.folder.resolve()), source.most_bytes]
    digest = hashlib.blake2b(json.dumps(given).encode(), digest_size=16)
    for row, name in zip(rows, names, strict=True):
        digest.update(json.dumps([row.line, name, row.name, row.captions, row.classes, row.extra]).encode())
    return digest.hexdigest()


def make_keys(names: Sequence[str], prefix: str = "") -> list[str]:
    """A valid, unique key for each path or URL; one gets the same key wherever it stands in the table."""
    plain = [prefix + re.sub(r"[^A-Za-z0-9_-]+", "_", _stem(name)).strip("_") for name in names]
    shared = Counter(plain)
    return [
        key if key and len(key) <= LONGEST_KEY and shared[key] == 1 else f"{key[: LONGEST_KEY - 17]}-{_short(name)}"
        for key, name in zip(plain, names, strict=True)
    ]


def _stem(name: str) -> str:
    """A path without its extension, a URL without protocol and query too."""
    return re.split(r"[?#]", URL.sub("", name))[0].rsplit(".", 1)[0] if URL.match(name) else name.rsplit(".", 1)[0]


def _short(name: str) -> str:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _checked(audio_folder: Path, row: Row, table: str) -> str:
    """A row's URL, or the real path of its audio in the folder; links count as what they point to."""
    if URL.match(row.audio):
        check_url(row.audio, f"{table}, line {row.line}")
        return row.audio
    try:
        path = (audio_folder / row.audio).resolve()
        inside = path.is_relative_to(audio_folder)
    except (OSError, ValueError):  # too long a name, a null character, a loop of links
        inside = False
    if not inside:
        raise InputError(
            f"{table}, line {row.line}: {row.audio!r} leads out of {audio_folder}: keep the files inside it"
        )
    return path.relative_to(audio_folder).as_posix()


def read_quarantine(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a folder's quarantine.jsonl, if there is one."""
    path = folder / QUARANTINE
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
