"""Packing a table of clips into shards: by many processes, and on from where an earlier call stopped."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ask_dist.data.audio import BadSample
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
LOCK = f"{ASIDE}.lock"
VERSION = 3  # of what packing writes; another one takes up nothing of this
log = logging.getLogger(__name__)


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
        lost: how many of those left out were out of reach, and may not be next time.
    """

    clips: int
    seconds: float
    shards: int
    classes: dict[str, int]
    skipped: list[dict[str, Any]]
    kept: int
    lost: int


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
    keeps. Until the last shard is written, what was packed in `folder` before stays. Rows whose audio was out of reach
    are tried again by the next call after a finished one, and what it gets comes behind the other shards.

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
        InputError: a path leads out of the source's folder, a URL is of a kind that is not read, no clip is left, the
            folder holds tars of another split, or another call is packing into it.
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
    earlier = None if again else _packed_before(folder, digest)
    if earlier and not earlier["lost"]:
        return _summary(earlier, list(read_quarantine(folder)), kept=len(rows))
    with _alone(folder):
        aside = folder / ASIDE
        lines = {row.line for row in rows}
        if earlier:
            lines = set(earlier["lost"])
            refused = [record for record in read_quarantine(folder) if record["line"] not in lines]
        results = _take_up(aside, digest, lines if earlier else (), again)
        kept = len(rows) - len(lines) + sum(result["rows"] for result in results.values())
        tasks = _tasks(rows, names, lines, aside, settings, source)
        left = (task for task in tasks if task.number not in results)
        report = None if progress is None else (lambda done: progress(kept + done, len(rows)))
        for number, result in in_processes(pack_rows, left, processes, report):
            results[number] = result
        results[-1] = {"shards": [], "skipped": refused, "lost": []}
        skipped = sorted(_all(results, "skipped"), key=lambda record: record["line"])
        if not earlier and not any(_all(results, "shards")):
            shutil.rmtree(aside)
            raise InputError(f"all {len(skipped)} audio files of {name} are bad, the first: {skipped[0]['reason']}")
        sizes = _publish(results, skipped, aside, folder, settings.split, digest, earlier)
        return _summary(sizes, skipped, kept)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other calls out of the folder, until this process ends at the latest.

    Raises:
        InputError: another call is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another ask-dist pack writes into {folder}: let it end, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            log.warning("%s can't be locked: let no other ask-dist pack write into it", folder)
        yield


def _wanted(rows: Sequence[Row], source: Source, table: str) -> tuple[list[Row], list[str], list[dict[str, Any]]]:
    """The rows that are to be packed, their URLs or checked paths, and a record for each of the others."""
    audio_folder = source.folder.resolve()
    first: dict[str, Row] = {}
    refused: list[dict[str, Any]] = []
    for row in rows:
        name, reason = "", row.refused
        if not reason:
            try:
                name = _checked(audio_folder, row, table)
                reason = f"the same file as line {first[name].line}" if name in first else ""
            except BadSample as error:
                reason = str(error)
        if reason:
            refused.append({"line": row.line, "audio": row.audio, "reason": reason})
        else:
            first[name] = row
    return list(first.values()), list(first), refused


def _tasks(
    rows: Sequence[Row],
    names: Sequence[str],
    wanted: Collection[int],
    aside: Path,
    settings: PackSettings,
    source: Source,
) -> Iterator[Task]:
    """The rows of the wanted lines in runs of `clips_per_shard`."""
    named = [
        f"{row.name}{PurePosixPath(name).suffix}" if row.name else name for row, name in zip(rows, names, strict=True)
    ]
    keys = make_keys(named, settings.key_prefix)
    chosen = (entry for entry in zip(rows, names, keys, strict=True) if entry[0].line in wanted)
    for number in itertools.count():
        run = tuple(itertools.islice(chosen, settings.clips_per_shard))
        if not run:
            return
        taken, places, their_keys = zip(*run, strict=True)
        yield Task(number, taken, places, their_keys, aside, settings, source)


def _publish(
    results: dict[int, dict[str, Any]],
    skipped: Sequence[dict[str, Any]],
    aside: Path,
    folder: Path,
    split: str,
    digest: str,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """Put what the tasks did behind the shards of `earlier`, or in the place of others; the content of sizes.json."""
    if not earlier:
        (folder / SIZES).unlink(missing_ok=True)  # publish does so too; the old one must not stand beside new records
    if skipped:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in skipped)
        write_atomically(folder / QUARANTINE, lines.encode(errors="backslashreplace"))
    else:
        (folder / QUARANTINE).unlink(missing_ok=True)
    shards = [WrittenShard(**shard) for shard in _all(results, "shards")]
    sizes = publish(shards, aside, folder, split, earlier, packed_from=digest, lost=sorted(_all(results, "lost")))
    shutil.rmtree(aside)
    return sizes


def _all(results: dict[int, dict[str, Any]], what: str) -> list[Any]:
    """The entries of that name of all tasks, in their order."""
    return [entry for _, result in sorted(results.items()) for entry in result[what]]


def _summary(sizes: dict[str, Any], skipped: list[dict[str, Any]], kept: int) -> PackSummary:
    shards = sizes["shards"].values()
    clips, seconds = (sum(shard[what] for shard in shards) for what in ("clips", "seconds"))
    return PackSummary(clips, seconds, len(shards), sizes["classes"], skipped, kept, len(sizes["lost"]))


def _packed_before(folder: Path, digest: str) -> dict[str, Any] | None:
    """The sizes.json of a finished call with the same rows and settings, if what it left is still there."""
    if not (folder / SIZES).is_file():
        return None
    try:
        sizes = read_sizes(folder)
    except InputError:
        return None
    if sizes.get("packed_from") != digest or not all((folder / name).is_file() for name in sizes["shards"]):
        return None
    return sizes


def _take_up(aside: Path, digest: str, lost: Collection[int], again: bool) -> dict[int, dict[str, Any]]:
    """What the tasks of an earlier call with the same digest have finished, by number; anything else is removed.

    With lines that a call before that has `lost`, the tasks are of these.
    """
    plan = {"version": VERSION, "digest": digest, "lost": sorted(lost)}
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
    """A row's URL, or the real path of its audio in the folder; links count as what they point to.

    Raises:
        BadSample: it is a loop of links.
        InputError: it leads out of the folder, or is a URL of a kind that is not read.
    """
    if URL.match(row.audio):
        check_url(row.audio, f"{table}, line {row.line}")
        return row.audio
    try:
        path = (audio_folder / row.audio).resolve()
        inside = path.is_relative_to(audio_folder)
    except RuntimeError:  # pathlib's, not an OSError
        raise BadSample("unreadable file: a loop of links") from None
    except (OSError, ValueError):  # too long a name, a null character
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
