"""Reading shards: raw clips in order, and a clip's audio and captions out of its bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from ask_dist.data import audio
from ask_dist.data.audio import BadSample


@dataclass(frozen=True)
class Raw:
    """The undecoded members of one clip; when the shard could not be read this far, `problem` says so instead."""

    shard: str
    key: str
    members: dict[str, bytes] = field(repr=False)
    problem: str | None = None


def read_shard(path: Path, first: int, count: int) -> Iterator[Raw]:
    """Clips first..first+count of a tar, always `count` of them: those that can't be read have a `problem`."""
    problems: list[str] = []

    def note(error: Exception) -> bool:
        problems.append(str(error.args[0]) if error.args else type(error).__name__)
        return True

    done = 0
    try:
        with path.open("rb") as stream:
            files = tar_file_expander([{"url": str(path), "stream": stream}], handler=note)
            for sample in itertools.islice(group_by_keys(files, handler=note), first, first + count):
                yield Raw(path.name, sample["__key__"], sample)
                done += 1
    except OSError as error:
        note(error)
    if done < count:
        problem = f"the shard could be read up to clip {first + done} only" + "".join(f": {p}" for p in problems[:1])
        yield from itertools.repeat(Raw(path.name, "", {}, problem), count - done)


def open_clip(raw: Raw, sample_rate: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode a clip.

    Returns:
        float32 [samples] at `sample_rate`, and the JSON description, whose captions are a list of non-empty strings.

    Raises:
        BadSample: whatever keeps the clip from being used.
    """
    if raw.problem:
        raise BadSample(raw.problem)
    missing = [name for name in ("flac", "json") if name not in raw.members]
    if missing:
        raise BadSample(f"no .{' and no .'.join(missing)} member")
    try:
        description = json.loads(raw.members["json"])
        captions = description["captions"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample(f"unusable JSON: {type(error).__name__} {error}") from None
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise BadSample("no caption, or an empty one")
    samples, rate = audio.decode(raw.members["flac"])
    return audio.resample(samples, rate, sample_rate), description
