"""Whether shards are what their sizes.json says, and hold nothing that does not belong there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ask_dist.data import audio
from ask_dist.data.audio import BadSample
from ask_dist.data.inspect.tar_clips import TarClip, clips_of
from ask_dist.data.processes import in_processes, tick
from ask_dist.data.shards import read_sizes, stable_id

LONGEST_SECONDS = 86400.0


@dataclass(frozen=True)
class Problem:
    """Something wrong with a shard, or with a clip or member in it."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}{f' {self.key}' if self.key else ''}: {self.reason}"


@dataclass(frozen=True)
class _Task:
    path: Path
    listed: dict[str, Any]
    decode: bool


def verify(
    folder: Path,
    *,
    decode: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Read every byte of a split's shards.

    Args:
        folder: of the shards and their sizes.json.
        decode: also decode every clip, and refuse what is silent, empty, NaN or infinite.
        progress: called with clips looked at and clips in all.

    Returns:
        The problems, by shard; none if all is well.

    Raises:
        InputError: the folder or its sizes.json is missing or not readable as such.
    """
    listed = read_sizes(folder)["shards"]
    total = sum(shard["clips"] for shard in listed.values())
    report = None if progress is None else (lambda done: progress(done, total))
    present = [name for name in sorted(listed) if (folder / name).is_file()]
    problems = [Problem(name, "", "is listed in sizes.json but missing") for name in set(listed) - set(present)]
    unlisted = {path.name for path in folder.glob("*.tar")} - set(listed)
    problems += [Problem(name, "", "is not listed in sizes.json") for name in unlisted]
    ids: dict[str, np.ndarray] = {}
    tasks = (_Task(folder / name, listed[name], decode) for name in present)
    for name, found, own in in_processes(_verify_shard, tasks, processes, report):
        problems += found
        ids[name] = own
    problems += _repeated(folder, ids)
    return sorted(problems, key=lambda problem: problem.shard)


def _verify_shard(task: _Task) -> tuple[str, list[Problem], np.ndarray]:
    """The shard's name, its problems, and int64 [clips]: the ids of its clips."""
    name = task.path.name
    problems: list[Problem] = []

    def note(key: str, reason: str) -> None:
        problems.append(Problem(name, key, reason))

    with task.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != task.listed["sha256"]:
            note("", "is not what was packed: its SHA-256 differs from that in sizes.json")
    ids = []
    for clip in clips_of(task.path, note):
        ids.append(stable_id(clip.key))
        if task.decode:
            _decode(clip, note)
        tick()
    if len(ids) != task.listed["clips"]:
        note("", f"has {len(ids)} whole clips, {task.listed['clips']} are listed in sizes.json")
    return name, problems, np.array(ids, dtype=np.int64)


def _decode(clip: TarClip, note: Callable[[str, str], None]) -> None:
    try:
        audio.decode(clip.audio, LONGEST_SECONDS)
    except BadSample as error:
        note(clip.key, str(error))


def _repeated(folder: Path, ids: dict[str, np.ndarray]) -> list[Problem]:
    """The clips whose key an earlier shard has too."""
    problems = []
    names = sorted(ids)
    flat = np.concatenate([ids[name] for name in names]) if names else np.empty(0, np.int64)
    shard = np.repeat(np.arange(len(names)), [len(ids[name]) for name in names])
    _, first, counts = np.unique(flat, return_index=True, return_counts=True)
    known = set(flat[first[counts > 1]].tolist())
    for index in sorted(set(shard[np.isin(flat, list(known))].tolist())) if known else ():
        for clip in clips_of(folder / names[index], lambda key, reason: None):
            if stable_id(clip.key) in known and np.count_nonzero(flat[shard < index] == stable_id(clip.key)):
                problems.append(Problem(names[index], clip.key, "is a key of an earlier shard too"))
    return problems
